/* A GPU as the machine of a model: weights and one arena in its memory, launches in their order. */
#include "gpu.h"

#include <dlfcn.h>

/* What models share: the device, and the weights on it. */
typedef struct {
  _Atomic int32_t users;
  gpu *device;
  gpu_memory *weights;
  size_t bytes;
} shared_weights;

struct machine {
  const dance_program *program;
  shared_weights *shared;
  gpu_queue *queue;
  gpu_memory arena;
  gpu_memory *inputs, *next; /* a buffer for each input; a stream's state after this frame */
  gpu_memory *tensors;       /* where each tensor lies */
  unsigned char **shown;     /* copies for who looks at them */
};

void *open_driver(const char *named, const char *const *usual, const char *advice) {
  void *library = NULL;
  if (!named) named = getenv("DANCE_GPU_DRIVER");
  if (named) {
    if (!(library = dlopen(named, RTLD_NOW | RTLD_LOCAL))) COMPLAIN(named, " cannot be loaded: ", dlerror());
    return library;
  }
  for (; *usual && !library; usual++) library = dlopen(*usual, RTLD_NOW | RTLD_LOCAL);
  if (!library) COMPLAIN(advice);
  return library;
}

void *function_of(void *library, const char *name) {
  void *found = dlsym(library, name);
  if (!found) COMPLAIN("the GPU's driver is too old: it lacks ", name);
  return found;
}

static void leave_shared(shared_weights *shared) {
  if (!shared || atomic_fetch_sub(&shared->users, 1) != 1) return;
  for (int32_t each = 0; shared->weights && each < dance_the_program.weight_count; each++)
    if (shared->weights[each]) give_memory(shared->device, shared->weights[each]);
  free(shared->weights);
  close_gpu(shared->device);
  free(shared);
}

static void give_all(machine *on, gpu_memory *memory, int32_t count) {
  for (int32_t each = 0; memory && each < count; each++)
    if (memory[each]) give_memory(on->shared->device, memory[each]);
  free(memory);
}

void close_machine(machine *on) {
  if (!on) return;
  close_queue(on->queue);
  for (int32_t each = 0; on->tensors && each < on->program->tensor_count; each++)
    if (on->tensors[each] && on->program->tensors[each].where == IN_ARENA) give_part(on->shared->device, on->tensors[each]);
  for (int32_t each = 0; on->shown && each < on->program->tensor_count; each++) free(on->shown[each]);
  if (on->arena) give_memory(on->shared->device, on->arena);
  give_all(on, on->inputs, on->program->input_count);
  give_all(on, on->next, on->program->input_count);
  free(on->tensors);
  free(on->shown);
  leave_shared(on->shared);
  free(on);
}

/* Weights are prepared in this process, and given to the device. */
static int upload(shared_weights *shared, const weight_set *weights) {
  const dance_program *program = &dance_the_program;
  gpu_queue *queue = NULL;
  int code = open_queue(&queue, shared->device);
  for (int32_t each = 0; each < program->weight_count && !code; each++) {
    const size_t bytes = (size_t)program->weights[each].bytes;
    code = take_memory(shared->device, &shared->weights[each], bytes);
    if (!code && bytes) code = copy_in(queue, shared->weights[each], weight_data(weights, each), bytes);
    shared->bytes += bytes;
  }
  if (!code) code = finish_queue(queue);
  close_queue(queue);
  return code;
}

static int open_shared(machine *on, const dance_options *options, char *error, size_t room) {
  shared_weights *shared = calloc(1, sizeof *shared);
  weight_set *weights = NULL;
  on->shared = shared;
  if (!shared) return DANCE_NO_MEMORY;
  atomic_store(&shared->users, 1);
  shared->weights = calloc((size_t)on->program->weight_count + 1, sizeof *shared->weights);
  if (!shared->weights) return DANCE_NO_MEMORY;
  int code = open_gpu(&shared->device, options) ? DANCE_FAILED : DANCE_OK;
  if (code) {
    SAY(error, room, kernel_error());
    return code;
  }
  code = load_weights(&weights, options, error, room);
  if (!code && upload(shared, weights)) {
    SAY(error, room, kernel_error());
    code = DANCE_FAILED;
  }
  leave_weights(weights);
  return code;
}

static int place_tensors(machine *on) {
  const dance_program *program = on->program;
  gpu *device = on->shared->device;
  int code = take_memory(device, &on->arena, rounded(program->arena_bytes) + ALIGNMENT);
  for (int32_t each = 0; each < program->input_count && !code; each++)
    code = take_memory(device, &on->inputs[each], program->inputs[each].bytes);
  for (int32_t each = 1; on->next && each < program->input_count && !code; each++)
    code = take_memory(device, &on->next[each], program->inputs[each].bytes);
  for (int32_t each = 0; each < program->tensor_count && !code; each++) {
    const program_tensor *tensor = &program->tensors[each];
    if (tensor->where == IN_INPUT) on->tensors[each] = on->inputs[tensor->index];
    else if (tensor->where == IN_WEIGHT) on->tensors[each] = on->shared->weights[tensor->index];
    else code = take_part(device, &on->tensors[each], on->arena, (size_t)tensor->offset, tensor->bytes);
  }
  return code;
}

static int bind_launches(machine *on) {
  const gpu_code *code = on->program->gpu;
  for (int32_t each = 0; each < code->launch_count; each++) {
    const gpu_launch *launch = &code->launches[each];
    gpu_memory *given = calloc((size_t)launch->count + 1, sizeof *given);
    if (!given) return -1;
    for (int32_t one = 0; one < launch->count; one++) given[one] = on->tensors[code->given[launch->first + one]];
    int refused = bind_launch(on->queue, each, given);
    free(given);
    if (refused) return refused;
  }
  return 0;
}

int open_machine(machine **found, const dance_options *options, const machine *share, int streams, char *error, size_t room) {
  machine *on = calloc(1, sizeof *on);
  int code = DANCE_OK;
  *found = on;
  if (!on) return DANCE_NO_MEMORY;
  on->program = &dance_the_program;
  if (share) {
    on->shared = share->shared;
    atomic_fetch_add(&on->shared->users, 1);
  } else {
    code = open_shared(on, options, error, room);
  }
  if (code) return code;
  on->inputs = calloc((size_t)on->program->input_count + 1, sizeof *on->inputs);
  on->next = streams ? calloc((size_t)on->program->input_count + 1, sizeof *on->next) : NULL;
  on->tensors = calloc((size_t)on->program->tensor_count + 1, sizeof *on->tensors);
  on->shown = calloc((size_t)on->program->tensor_count + 1, sizeof *on->shown);
  if (!on->inputs || (streams && !on->next) || !on->tensors || !on->shown) return DANCE_NO_MEMORY;
  forget_error();
  if (open_queue(&on->queue, on->shared->device) || place_tensors(on) || bind_launches(on) || (streams && forget_state(on))) {
    if (kernel_error()[0]) SAY(error, room, kernel_error());
    return DANCE_FAILED;
  }
  return DANCE_OK;
}

int give_addresses(machine *on, const void *const *inputs, void *const *outputs, int32_t count) {
  (void)outputs, (void)count; /* they are brought back once they are made */
  for (int32_t each = 0; each < on->program->input_count; each++) {
    const size_t bytes = on->program->inputs[each].bytes;
    if (inputs[each] && bytes && copy_in(on->queue, on->inputs[each], inputs[each], bytes)) return -1;
  }
  return 0;
}

int run_step(machine *on, int32_t index) {
  const program_step *step = &on->program->steps[index];
  for (int32_t each = step->launch; each < step->launch + step->launches; each++)
    if (start_launch(on->queue, each)) return -1;
  return 0;
}

int finish_steps(machine *on) { return finish_queue(on->queue); }

int take_output(machine *on, int32_t index, void *to) {
  const dance_program *program = on->program;
  const size_t bytes = program->outputs[index].bytes;
  return bytes ? copy_out(on->queue, to, on->tensors[program->output_tensors[index]], bytes) : 0;
}

/* In two steps, since an output may be another input as it is. */
int keep_state(machine *on) {
  const dance_program *program = on->program;
  for (int32_t each = 1; each < program->output_count; each++)
    if (copy_within(on->queue, on->next[each], on->tensors[program->output_tensors[each]], program->outputs[each].bytes)) return -1;
  for (int32_t each = 1; each < program->output_count; each++)
    if (copy_within(on->queue, on->inputs[each], on->next[each], program->outputs[each].bytes)) return -1;
  return finish_queue(on->queue);
}

int forget_state(machine *on) {
  for (int32_t each = 1; each < on->program->input_count; each++) {
    const size_t bytes = on->program->inputs[each].bytes;
    void *zeros = calloc(1, bytes + 1);
    int code = zeros && !copy_in(on->queue, on->inputs[each], zeros, bytes) ? 0 : -1;
    free(zeros);
    if (code) return code;
  }
  return 0;
}

int show_tensor(machine *on, int32_t tensor, dance_view *view) {
  const program_tensor *shown = &on->program->tensors[tensor];
  if (!on->shown[tensor] && !(on->shown[tensor] = aligned(shown->bytes))) return -1;
  *view = (dance_view){on->shown[tensor], shown->shape, shown->rank, shown->kind, shown->bits};
  return shown->bytes ? copy_out(on->queue, on->shown[tensor], on->tensors[tensor], shown->bytes) : 0;
}

size_t machine_bytes(const machine *on) {
  size_t bytes = on->program->arena_bytes + (atomic_load(&on->shared->users) == 1 ? on->shared->bytes : 0);
  for (int32_t each = 0; each < on->program->input_count; each++) bytes += on->program->inputs[each].bytes * (on->next ? 2 : 1);
  return bytes;
}
