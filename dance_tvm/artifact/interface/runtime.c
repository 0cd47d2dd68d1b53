/* Runs the program that a build generated: kernels in their order, on the machine that it was built for. */
#include "runtime.h"

#define MOST_INPUTS 64

struct dance_model {
  const dance_program *program;
  machine *machine;
  dance_layer_time *times;
  int64_t *macs; /* of each step, as `times` */
  int profiles, streams;
  _Atomic int cancelled, busy;
  dance_watcher watcher;
  void *context;
  dance_view *views; /* what the watcher is shown of one step */
  pool threads;
  char error[ERROR_BYTES];
};

/* The model that refused this thread's last call, as another thread's was under way. */
static _Thread_local const dance_model *refused_by;

static int refuse(dance_model *model, int code, const char *sentence) {
  refused_by = NULL;
  SAY(model->error, sizeof model->error, sentence);
  return code;
}

static int begin(dance_model *model) {
  const int busy = atomic_exchange_explicit(&model->busy, 1, memory_order_acquire);
  refused_by = busy ? model : NULL;
  return busy ? DANCE_BUSY : DANCE_OK;
}

static int end(dance_model *model, int code) {
  atomic_store_explicit(&model->busy, 0, memory_order_release);
  return code;
}

/* Where the machine failed: what it said. */
static int failed(dance_model *model, const char *what) {
  SAY(model->error, sizeof model->error, what, ": ", kernel_error());
  return DANCE_FAILED;
}

static void destroy(dance_model *model) {
  if (!model) return;
  end_pool(&model->threads);
  close_machine(model->machine);
  free(model->times);
  free(model->macs);
  free(model->views);
  free(model);
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

/* Nothing is counted yet, and of kernels that are no convolutions nothing can be. */
static void forget_profile(dance_model *model) {
  for (int32_t each = 0; each < model->program->step_count; each++) {
    const program_step *step = &model->program->steps[each];
    model->times[each] = (dance_layer_time){step->kernel, 0, 0};
    model->macs[each] = step->work < 0 ? -1 : 0;
  }
}

static int allocate(dance_model *model) {
  const dance_program *program = model->program;
  int32_t most = 0;
  model->times = calloc((size_t)program->step_count + 1, sizeof *model->times);
  model->macs = calloc((size_t)program->step_count + 1, sizeof *model->macs);
  for (int32_t each = 0; each < program->step_count; each++)
    if (program->steps[each].count > most) most = program->steps[each].count;
  model->views = calloc((size_t)most + 1, sizeof *model->views);
  if (!model->views || !model->times || !model->macs) return DANCE_NO_MEMORY;
  forget_profile(model);
  return DANCE_OK;
}

static int start_threads(dance_model *model, const dance_options *options, char *error, size_t room) {
  int32_t threads = options->threads ? options->threads : model->program->threads;
  if (threads < 1 || threads > MOST_THREADS) {
    SAY(error, room, "a model runs on 1 to 64 threads: give another number of them");
    return DANCE_BAD_ARGUMENT;
  }
  return start_pool(&model->threads, threads, options, error, room);
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
  model->streams = is_streaming(model->program);
  int code = require_instructions(model->program, error, room);
  if (!code) code = start_threads(model, &given, error, room);
  if (!code) {
    seat before = enter(&model->threads);
    code = open_machine(&model->machine, &given, given.share ? given.share->machine : NULL, model->streams, error, room);
    leave(before);
  }
  if (!code) code = allocate(model);
  if (code) {
    destroy(model);
    return NULL;
  }
  if (error && room) error[0] = 0;
  return model;
}

static int show_watcher(dance_model *model, const program_step *step) {
  int32_t count = 0;
  for (int32_t each = step->first; each < step->first + step->count; each++) {
    const program_argument *argument = &model->program->arguments[each];
    if (argument->kind != TENSOR) continue;
    if (show_tensor(model->machine, argument->tensor, &model->views[count++])) return -1;
  }
  model->watcher(model->context, step->kernel, model->views, count);
  return 0;
}

static int one_step(dance_model *model, int32_t index) {
  const program_step *step = &model->program->steps[index];
  const char *kernel = step->kernel;
  const int64_t start = model->profiles ? now() : 0;
  if (run_step(model->machine, index) || (model->profiles && finish_steps(model->machine))) return failed(model, kernel);
  if (model->profiles) {
    model->times[index].calls++;
    model->times[index].nanoseconds += now() - start;
    if (step->work >= 0 && count_work(model->machine, &model->program->works[step->work], &model->macs[index]))
      return failed(model, kernel);
  }
  return model->watcher && show_watcher(model, step) ? failed(model, kernel) : DANCE_OK;
}

static int run_steps(dance_model *model) {
  int code = DANCE_OK;
  for (int32_t each = 0; each < model->program->step_count && !code; each++) {
    code = one_step(model, each);
    if (atomic_load_explicit(&model->cancelled, memory_order_relaxed))
      code = refuse(model, DANCE_CANCELLED, "the call was cancelled");
  }
  return code;
}

/* Inputs in, steps, outputs out: all of them, or the first one, and the state stays where it is. */
static int call(dance_model *model, const void *const *inputs, void *const *outputs, int32_t count) {
  int code = begin(model);
  if (code) return code;
  seat before = enter(&model->threads);
  atomic_store(&model->cancelled, 0);
  if (give_addresses(model->machine, inputs, outputs, count)) code = failed(model, "the inputs");
  if (!code) code = run_steps(model);
  for (int32_t each = 0; each < count && !code; each++)
    if (take_output(model->machine, each, outputs[each])) code = failed(model, "the outputs");
  if (!code && count < model->program->output_count && keep_state(model->machine)) code = failed(model, "the state");
  leave(before);
  return end(model, code);
}

/* Whether two outputs share memory: what the kernels wrote of one would be lost. */
static int outputs_overlap(const dance_program *program, void *const *outputs) {
  for (int32_t one = 1; one < program->output_count; one++)
    for (int32_t other = 0; other < one; other++) {
      const uintptr_t begin = (uintptr_t)outputs[one], other_begin = (uintptr_t)outputs[other];
      if (begin < other_begin + program->outputs[other].bytes && other_begin < begin + program->outputs[one].bytes) return 1;
    }
  return 0;
}

static int run(dance_model *model, const void *const *inputs, void *const *outputs) {
  const dance_program *program = model->program;
  for (int32_t each = 0; each < program->input_count; each++)
    if (!inputs || !inputs[each]) return refuse(model, DANCE_BAD_ARGUMENT, "an input's address is missing");
  for (int32_t each = 0; each < program->output_count; each++)
    if (!outputs || !outputs[each]) return refuse(model, DANCE_BAD_ARGUMENT, "an output's address is missing");
  if (outputs_overlap(program, outputs))
    return refuse(model, DANCE_BAD_ARGUMENT, "two outputs lie in the same memory: give each a buffer of its own");
  return call(model, inputs, outputs, program->output_count);
}

static int step(dance_model *model, const void *frame, void *output) {
  const void *inputs[MOST_INPUTS] = {frame};
  if (!model->streams || model->program->input_count > MOST_INPUTS)
    return refuse(model, DANCE_BAD_ARGUMENT, "this is not a streaming network: its outputs after the first are not its next state");
  if (!frame || !output) return refuse(model, DANCE_BAD_ARGUMENT, "a frame's or output's address is missing");
  return call(model, inputs, &output, 1);
}

static int reset(dance_model *model) {
  const int code = begin(model);
  return code ? code : end(model, forget_state(model->machine) ? failed(model, "the state") : DANCE_OK);
}

static int profile(dance_model *model, int on) {
  const int code = begin(model);
  if (code) return code;
  forget_profile(model);
  model->profiles = on;
  return end(model, DANCE_OK);
}

static int32_t layers(dance_model *model, const dance_layer_time **times) {
  if (times) *times = model->times;
  return model->program->step_count;
}

static int32_t work(dance_model *model, const int64_t **macs) {
  if (macs) *macs = model->macs;
  return model->program->step_count;
}

static void cancel(dance_model *model) { atomic_store(&model->cancelled, 1); }

static const char *error_of(const dance_model *model) {
  return refused_by == model ? "the model is running in another thread: its calls must not overlap" : model->error;
}

static size_t memory(const dance_model *model) {
  size_t bytes = sizeof *model + machine_bytes(model->machine);
  for (int32_t each = 0; each < MOST_THREADS; each++) bytes += model->threads.scratches[each].room;
  return bytes;
}

static void watch(dance_model *model, dance_watcher watcher, void *context) {
  model->watcher = watcher;
  model->context = context;
}

static int steps_alone(dance_model *model) {
  const int code = begin(model);
  return code ? code : end(model, run_steps(model));
}

/* A whole call; on a GPU its steps alone, between inputs and outputs that are brought there and back. */
static int timed(dance_model *model, const void *const *inputs, void *const *outputs, int64_t *nanoseconds) {
  const int64_t start = now();
  int code = model->program->gpu ? steps_alone(model) : run(model, inputs, outputs);
  if (!code && finish_steps(model->machine)) code = failed(model, "the call");
  *nanoseconds = now() - start;
  return code;
}

static int time_runs(dance_model *model, const void *const *inputs, void *const *outputs, int32_t count, int64_t *nanoseconds) {
  if (count < 0 || (count && !nanoseconds))
    return refuse(model, DANCE_BAD_ARGUMENT, "time takes a number of runs and an array with room for the time of each");
  int code = model->program->gpu ? run(model, inputs, outputs) : DANCE_OK;
  for (int32_t each = 0; each < count && !code; each++) code = timed(model, inputs, outputs, &nanoseconds[each]);
  return code;
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
      .cancel = cancel, .error = error_of, .memory = memory, .destroy = destroy, .watch = watch, .time = time_runs,
      .work = work};
  return version == DANCE_VERSION ? &api : NULL;
}
