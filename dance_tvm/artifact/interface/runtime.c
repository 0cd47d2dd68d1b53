/* Runs the program that a build generated: one arena, kernels in their order, tables laid out once. */
#include "runtime.h"

#define MOST_INPUTS 64

struct dance_model {
  const dance_program *program;
  weight_set *weights;
  unsigned char *arena;
  unsigned char *staging; /* inputs whose addresses kernels would not take, and a stream's state */
  unsigned char *next;    /* a stream's state after this frame */
  size_t arena_bytes, staging_bytes;
  size_t *staged; /* where each input's copy lies in staging */
  dl_tensor *tensors;
  tvm_any *arguments;
  dance_layer_time *times;
  int profiles, streams;
  _Atomic int cancelled;
  dance_watcher watcher;
  void *context;
  dance_view *views; /* what the watcher is shown of one step */
  pool threads;
  char error[ERROR_BYTES];
};

static int refuse(dance_model *model, int code, const char *sentence) {
  SAY(model->error, sizeof model->error, sentence);
  return code;
}

static void destroy(dance_model *model) {
  if (!model) return;
  end_pool(&model->threads);
  leave_weights(model->weights);
  free(model->arena);
  free(model->staging);
  free(model->next);
  free(model->staged);
  free(model->tensors);
  free(model->arguments);
  free(model->times);
  free(model->views);
  free(model);
}

static void *data_of(const dance_model *model, const program_tensor *tensor) {
  switch (tensor->where) {
    case IN_ARENA: return model->arena + tensor->offset;
    case IN_WEIGHT: return (void *)weight_data(model->weights, tensor->index);
    default: return model->staging + model->staged[tensor->index];
  }
}

/* Tensors and arguments are laid out once: a call fills in the addresses of its inputs alone. */
static void lay_out(dance_model *model) {
  const dance_program *program = model->program;
  for (int32_t each = 0; each < program->tensor_count; each++) {
    const program_tensor *tensor = &program->tensors[each];
    dl_tensor *view = &model->tensors[each];
    view->data = data_of(model, tensor);
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
    tvm_any *any = &model->arguments[each];
    switch (argument->kind) {
      case TENSOR: any->type = ANY_DLTENSOR, any->value.pointer = &model->tensors[argument->tensor]; break;
      case INTEGER: any->type = ANY_INTEGER, any->value.integer = argument->integer; break;
      case REAL: any->type = ANY_REAL, any->value.real = argument->real; break;
    }
  }
  for (int32_t each = 0; each < program->step_count; each++) model->times[each].kernel = program->steps[each].kernel;
}

static int is_streaming(const dance_program *program) {
  if (program->input_count < 2 || program->input_count != program->output_count) return 0;
  for (int32_t each = 1; each < program->input_count; each++) {
    const dance_tensor *in = &program->inputs[each], *out = &program->outputs[each];
    if (in->rank != out->rank || in->kind != out->kind || in->bits != out->bits) return 0;
    for (int32_t axis = 0; axis < in->rank; axis++)
      if (in->shape[axis] != out->shape[axis]) return 0;
  }
  return 1;
}

static int allocate(dance_model *model) {
  const dance_program *program = model->program;
  int32_t most = 0;
  model->staged = calloc((size_t)program->input_count + 1, sizeof *model->staged);
  if (!model->staged) return DANCE_NO_MEMORY;
  for (int32_t each = 0; each < program->input_count; each++) {
    model->staged[each] = model->staging_bytes;
    model->staging_bytes += rounded(program->inputs[each].bytes);
  }
  model->streams = is_streaming(program);
  model->arena_bytes = program->arena_bytes;
  model->arena = aligned(model->arena_bytes);
  model->staging = aligned(model->staging_bytes);
  model->tensors = calloc((size_t)program->tensor_count + 1, sizeof *model->tensors);
  model->arguments = calloc((size_t)program->argument_count + 1, sizeof *model->arguments);
  model->times = calloc((size_t)program->step_count + 1, sizeof *model->times);
  for (int32_t each = 0; each < program->step_count; each++)
    if (program->steps[each].count > most) most = program->steps[each].count;
  model->views = calloc((size_t)most + 1, sizeof *model->views);
  if (!model->views || !model->arena || !model->staging || !model->tensors || !model->arguments || !model->times) return DANCE_NO_MEMORY;
  memset(model->staging, 0, model->staging_bytes);
  if (model->streams && !(model->next = aligned(model->staging_bytes))) return DANCE_NO_MEMORY;
  return DANCE_OK;
}

static int start_threads(dance_model *model, const dance_options *options, char *error, size_t room) {
  int32_t threads = options->threads ? options->threads : model->program->threads;
  if (threads < 1 || threads > MOST_THREADS) {
    SAY(error, room, "a model runs on 1 to 64 threads: give another number of them");
    return DANCE_BAD_ARGUMENT;
  }
  return start_pool(&model->threads, threads, options) ? DANCE_OK : DANCE_NO_MEMORY;
}

static int require_instructions(const dance_program *program, char *error, size_t room) {
  for (int32_t each = 0; each < program->instruction_count; each++) {
    if (processor_has(program->instructions[each])) continue;
    SAY(error, room, "the model uses ", program->instructions[each],
        " instructions, which this processor lacks: build it for a target without them");
    return DANCE_BAD_ARGUMENT;
  }
  return DANCE_OK;
}

static dance_model *create(const dance_options *options, char *error, size_t room) {
  static const dance_options none;
  dance_options given = none;
  if (options) memcpy(&given, options, options->size && options->size < sizeof given ? options->size : sizeof given);
  SAY(error, room, "memory is short");
  dance_model *model = calloc(1, sizeof *model);
  if (!model) return NULL;
  model->program = &dance_the_program;
  int code = require_instructions(model->program, error, room);
  if (!code) code = start_threads(model, &given, error, room);
  if (!code && given.share) {
    model->weights = given.share->weights;
    share_weights(model->weights);
  } else if (!code) {
    seat before = enter(&model->threads);
    code = load_weights(&model->weights, &given, error, room);
    leave(before);
  }
  if (!code) code = allocate(model);
  if (code) {
    destroy(model);
    return NULL;
  }
  lay_out(model);
  if (error && room) error[0] = 0;
  return model;
}

static void show(dance_model *model, const program_step *step) {
  int32_t count = 0;
  for (int32_t each = step->first; each < step->first + step->count; each++) {
    if (model->arguments[each].type != ANY_DLTENSOR) continue;
    const dl_tensor *tensor = model->arguments[each].value.pointer;
    model->views[count++] = (dance_view){tensor->data, tensor->shape, tensor->rank, tensor->dtype.code, tensor->dtype.bits};
  }
  model->watcher(model->context, step->kernel, model->views, count);
}

static int run_step(dance_model *model, int32_t index) {
  const program_step *step = &model->program->steps[index];
  tvm_any result = {0, 0, {0}};
  int code = DANCE_OK;
  int64_t start = model->profiles ? now() : 0;
  forget_error();
  lend(model->arena + step->free, step->free_bytes);
  if (step->call(NULL, model->arguments + step->first, step->count, &result)) {
    SAY(model->error, sizeof model->error, step->kernel, ": ", kernel_error());
    code = DANCE_FAILED;
  }
  if (model->profiles) {
    model->times[index].calls++;
    model->times[index].nanoseconds += now() - start;
  }
  if (model->watcher && !code) show(model, step);
  return code;
}

static int run_steps(dance_model *model) {
  seat before = enter(&model->threads);
  int code = DANCE_OK;
  for (int32_t each = 0; each < model->program->step_count && !code; each++) {
    code = run_step(model, each);
    if (atomic_load_explicit(&model->cancelled, memory_order_relaxed))
      code = refuse(model, DANCE_CANCELLED, "the call was cancelled");
  }
  leave(before);
  return code;
}

static void bind_inputs(dance_model *model, const void *const *inputs) {
  const dance_program *program = model->program;
  for (int32_t each = 0; each < program->tensor_count; each++) {
    const program_tensor *tensor = &program->tensors[each];
    if (tensor->where != IN_INPUT) continue;
    const void *given = inputs[tensor->index];
    if ((uintptr_t)given % ALIGNMENT) {
      void *copy = model->staging + model->staged[tensor->index];
      memcpy(copy, given, tensor->bytes);
      given = copy;
    }
    model->tensors[each].data = (void *)given;
  }
}

static int run(dance_model *model, const void *const *inputs, void *const *outputs) {
  const dance_program *program = model->program;
  for (int32_t each = 0; each < program->input_count; each++)
    if (!inputs || !inputs[each]) return refuse(model, DANCE_BAD_ARGUMENT, "an input's address is missing");
  for (int32_t each = 0; each < program->output_count; each++)
    if (!outputs || !outputs[each]) return refuse(model, DANCE_BAD_ARGUMENT, "an output's address is missing");
  atomic_store(&model->cancelled, 0);
  bind_inputs(model, inputs);
  int code = run_steps(model);
  for (int32_t each = 0; each < program->output_count && !code; each++)
    memcpy(outputs[each], model->tensors[program->output_tensors[each]].data, program->outputs[each].bytes);
  return code;
}

static int step(dance_model *model, const void *frame, void *output) {
  const dance_program *program = model->program;
  const void *inputs[MOST_INPUTS];
  if (!model->streams || program->input_count > MOST_INPUTS)
    return refuse(model, DANCE_BAD_ARGUMENT, "this is no streaming network: its outputs after the first are not its next state");
  if (!frame || !output) return refuse(model, DANCE_BAD_ARGUMENT, "a frame's or output's address is missing");
  inputs[0] = frame;
  for (int32_t each = 1; each < program->input_count; each++) inputs[each] = model->staging + model->staged[each];
  atomic_store(&model->cancelled, 0);
  bind_inputs(model, inputs);
  int code = run_steps(model);
  if (code) return code;
  memcpy(output, model->tensors[program->output_tensors[0]].data, program->outputs[0].bytes);
  for (int32_t each = 1; each < program->output_count; each++)
    memcpy(model->next + model->staged[each], model->tensors[program->output_tensors[each]].data, program->outputs[each].bytes);
  unsigned char *before = model->staging;
  model->staging = model->next;
  model->next = before;
  return DANCE_OK;
}

static int reset(dance_model *model) {
  memset(model->staging, 0, model->staging_bytes);
  return DANCE_OK;
}

static int profile(dance_model *model, int on) {
  for (int32_t each = 0; each < model->program->step_count; each++) model->times[each].calls = model->times[each].nanoseconds = 0;
  model->profiles = on;
  return DANCE_OK;
}

static int32_t layers(dance_model *model, const dance_layer_time **times) {
  if (times) *times = model->times;
  return model->program->step_count;
}

static void cancel(dance_model *model) { atomic_store(&model->cancelled, 1); }

static const char *error_of(const dance_model *model) { return model->error; }

static size_t memory(const dance_model *model) {
  size_t bytes = sizeof *model + model->arena_bytes + model->staging_bytes * (model->next ? 2 : 1);
  if (model->weights) bytes += weight_bytes(model->weights);
  for (int32_t each = 0; each < MOST_THREADS; each++) bytes += model->threads.scratches[each].room;
  return bytes;
}

static void watch(dance_model *model, dance_watcher watcher, void *context) {
  model->watcher = watcher;
  model->context = context;
}

static int time_runs(dance_model *model, const void *const *inputs, void *const *outputs, int32_t count, int64_t *nanoseconds) {
  for (int32_t each = 0; each < count; each++) {
    int64_t start = now();
    int code = run(model, inputs, outputs);
    nanoseconds[each] = now() - start;
    if (code) return code;
  }
  return DANCE_OK;
}

static const char *describe(void) { return dance_the_program.description; }

static int32_t inputs(const dance_tensor **tensors) {
  if (tensors) *tensors = dance_the_program.inputs;
  return dance_the_program.input_count;
}

static int32_t outputs(const dance_tensor **tensors) {
  if (tensors) *tensors = dance_the_program.outputs;
  return dance_the_program.output_count;
}

EXPORTED const dance_api *dance_model_api(uint32_t version) {
  static const dance_api api = {
      .version = DANCE_VERSION, .size = sizeof(dance_api), .describe = describe, .inputs = inputs, .outputs = outputs,
      .create = create, .run = run, .step = step, .reset = reset, .profile = profile, .layers = layers,
      .cancel = cancel, .error = error_of, .memory = memory, .destroy = destroy, .watch = watch, .time = time_runs};
  return version == DANCE_VERSION ? &api : NULL;
}
