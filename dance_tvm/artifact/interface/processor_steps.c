/* A processor as the machine of a model: one arena, kernels called in this process, tables laid out once. */
#include "runtime.h"

struct machine {
  const dance_program *program;
  weight_set *weights;
  unsigned char *arena;
  unsigned char *staging; /* inputs whose addresses kernels would not take, and a stream's state */
  unsigned char *next;    /* a stream's state after this frame */
  size_t staging_bytes;
  size_t *staged; /* where each input's copy lies in staging */
  dl_tensor *tensors;
  tvm_any *arguments;
};

void close_machine(machine *on) {
  if (!on) return;
  leave_weights(on->weights);
  free(on->arena);
  free(on->staging);
  free(on->next);
  free(on->staged);
  free(on->tensors);
  free(on->arguments);
  free(on);
}

static void *data_of(const machine *on, const program_tensor *tensor) {
  switch (tensor->where) {
    case IN_ARENA: return on->arena + tensor->offset;
    case IN_WEIGHT: return (void *)weight_data(on->weights, tensor->index);
    default: return on->staging + on->staged[tensor->index];
  }
}

/* Tensors and arguments are laid out once: a call fills in the addresses of its inputs alone. */
static void lay_out(machine *on) {
  const dance_program *program = on->program;
  for (int32_t each = 0; each < program->tensor_count; each++) {
    const program_tensor *tensor = &program->tensors[each];
    dl_tensor *view = &on->tensors[each];
    view->data = data_of(on, tensor);
    view->device.type = 1; /* a processor */
    view->rank = tensor->rank;
    view->dtype.code = tensor->kind;
    view->dtype.bits = tensor->bits;
    view->dtype.lanes = 1;
    view->shape = (int64_t *)tensor->shape;
    view->strides = (int64_t *)tensor->strides;
  }
  for (int32_t each = 0; each < program->argument_count; each++) {
    const program_argument *argument = &program->arguments[each];
    tvm_any *any = &on->arguments[each];
    switch (argument->kind) {
      case TENSOR: any->type = ANY_DLTENSOR, any->value.pointer = &on->tensors[argument->tensor]; break;
      case INTEGER: any->type = ANY_INTEGER, any->value.integer = argument->integer; break;
      case REAL: any->type = ANY_REAL, any->value.real = argument->real; break;
    }
  }
}

static int allocate(machine *on, int streams) {
  const dance_program *program = on->program;
  on->staged = calloc((size_t)program->input_count + 1, sizeof *on->staged);
  if (!on->staged) return DANCE_NO_MEMORY;
  for (int32_t each = 0; each < program->input_count; each++) {
    on->staged[each] = on->staging_bytes;
    on->staging_bytes += rounded(program->inputs[each].bytes);
  }
  on->arena = aligned(program->arena_bytes);
  on->staging = aligned(on->staging_bytes);
  on->tensors = calloc((size_t)program->tensor_count + 1, sizeof *on->tensors);
  on->arguments = calloc((size_t)program->argument_count + 1, sizeof *on->arguments);
  if (!on->arena || !on->staging || !on->tensors || !on->arguments) return DANCE_NO_MEMORY;
  memset(on->staging, 0, on->staging_bytes);
  if (streams && !(on->next = aligned(on->staging_bytes))) return DANCE_NO_MEMORY;
  lay_out(on);
  return DANCE_OK;
}

int open_machine(machine **found, const dance_options *options, const machine *share, int streams, char *error, size_t room) {
  machine *on = calloc(1, sizeof *on);
  *found = on;
  if (!on) return DANCE_NO_MEMORY;
  on->program = &dance_the_program;
  int code = DANCE_OK;
  if (share) {
    on->weights = share->weights;
    share_weights(on->weights);
  } else {
    code = load_weights(&on->weights, options, error, room);
  }
  return code ? code : allocate(on, streams);
}

static int taken(const void *address) { return address && !((uintptr_t)address % ALIGNMENT); }

static int meet(const void *one, size_t bytes, const void *other, size_t other_bytes) {
  const uintptr_t begin = (uintptr_t)one, other_begin = (uintptr_t)other;
  return one && other && begin < other_begin + other_bytes && other_begin < begin + bytes;
}

static int meets_inputs(const dance_program *program, const void *const *inputs, const void *output, size_t bytes) {
  for (int32_t each = 0; each < program->input_count; each++)
    if (meet(output, bytes, inputs[each], program->inputs[each].bytes)) return 1;
  return 0;
}

/* Whether an input is one of the outputs as it is, and gone by then: another output of the call is written over it. */
static int lost(const dance_program *program, int32_t index, const void *given, void *const *outputs, int32_t count) {
  int passed = 0, overwritten = 0;
  for (int32_t each = 0; each < program->output_count; each++) {
    const program_tensor *tensor = &program->tensors[program->output_tensors[each]];
    passed |= tensor->where == IN_INPUT && tensor->index == index;
    overwritten |= each < count && meet(outputs[each], program->outputs[each].bytes, given, program->inputs[index].bytes);
  }
  return passed && overwritten;
}

/* Where kernels write output `index` of a call: right to the caller's memory where they take its address and no input
 * is overwritten, else to the arena. */
static void *room_of(const machine *on, const program_tensor *tensor, const void *const *inputs, void *const *outputs, int32_t count) {
  const int32_t index = tensor->output - 1;
  void *given = index < count ? outputs[index] : NULL;
  const int direct = taken(given) && !meets_inputs(on->program, inputs, given, tensor->bytes);
  return direct ? given : on->arena + tensor->offset;
}

int give_addresses(machine *on, const void *const *inputs, void *const *outputs, int32_t count) {
  const dance_program *program = on->program;
  /* A run leaves the state of a stream as it is: what comes after it is written anew with each step. */
  unsigned char *staging = on->next && count == program->output_count ? on->next : on->staging;
  for (int32_t each = 0; each < program->tensor_count; each++) {
    const program_tensor *tensor = &program->tensors[each];
    if (tensor->output) on->tensors[each].data = room_of(on, tensor, inputs, outputs, count);
    if (tensor->where != IN_INPUT) continue;
    const void *given = inputs[tensor->index];
    void *copy = staging + on->staged[tensor->index];
    const int in_place = taken(given) && !lost(program, tensor->index, given, outputs, count);
    if (given && !in_place) memcpy(copy, given, tensor->bytes);
    on->tensors[each].data = in_place ? (void *)given : copy;
  }
  return 0;
}

int run_step(machine *on, int32_t index) {
  const program_step *step = &on->program->steps[index];
  tvm_any result = {0, 0, {0}};
  forget_error();
  lend(on->arena + step->free, step->free_bytes);
  return step->call(NULL, on->arguments + step->first, step->count, &result);
}

int finish_steps(machine *on) {
  (void)on;
  return 0;
}

int take_output(machine *on, int32_t index, void *to) {
  const dance_program *program = on->program;
  const void *from = on->tensors[program->output_tensors[index]].data;
  if (from != to) memcpy(to, from, program->outputs[index].bytes);
  return 0;
}

int keep_state(machine *on) {
  for (int32_t each = 1; each < on->program->output_count; each++) take_output(on, each, on->next + on->staged[each]);
  unsigned char *before = on->staging;
  on->staging = on->next;
  on->next = before;
  return 0;
}

int forget_state(machine *on) {
  memset(on->staging, 0, on->staging_bytes);
  return 0;
}

int show_tensor(machine *on, int32_t tensor, dance_view *view) {
  const dl_tensor *shown = &on->tensors[tensor];
  *view = (dance_view){shown->data, shown->shape, shown->rank, shown->dtype.code, shown->dtype.bits};
  return 0;
}

size_t machine_bytes(const machine *on) {
  return on->program->arena_bytes + on->staging_bytes * (on->next ? 2 : 1) + (on->weights ? weight_bytes(on->weights) : 0);
}
