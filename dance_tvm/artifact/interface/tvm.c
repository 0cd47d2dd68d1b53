/* The same model for TVM: functions that tvm.runtime.load_module finds, here and behind TVM RPC.
 *
 *     dance_create(path of the weights or "", threads or 0, verified) -> model
 *     dance_run(model, inputs ..., outputs ...)
 *     dance_time(model, runs, nanoseconds int64 (runs,), inputs ..., outputs ...)
 *     dance_profile(model, runs, nanoseconds int64 (runs, steps), inputs ..., outputs ...)
 *     dance_steps() -> steps; dance_step_name(step, uint8 (room,)) -> its length
 *     dance_watch(model, address of a dance_watcher, or 0)
 *     dance_destroy(model)
 */
#include "runtime.h"

#define MOST_TENSORS 256
#define OBJECT_HEADER 24 /* of TVM's objects, before what they hold */
#define TVM_FUNCTION(name) EXPORTED int __tvm_ffi_dance_##name(void *self, const tvm_any *given, int32_t count, tvm_any *result)

extern void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) __attribute__((weak));

const dance_api *dance_model_api(uint32_t version);

static int raise(const char *sentence) {
  if (TVMFFIErrorSetRaisedFromCStr) TVMFFIErrorSetRaisedFromCStr("RuntimeError", sentence);
  return -1;
}

static int give(tvm_any *result, int64_t value) {
  *result = (tvm_any){ANY_INTEGER, 0, {value}};
  return 0;
}

static const char *text_of(const tvm_any *any, char *room, size_t bytes) {
  const char *text = any->value.pointer;
  size_t length = any->length;
  if (any->type == ANY_RAW_STRING) return text;
  if (any->type == ANY_SMALL_STRING) text = any->value.text;
  else if (any->type == ANY_STRING) {
    const char *object = any->value.pointer;
    memcpy(&text, object + OBJECT_HEADER, sizeof text);
    memcpy(&length, object + OBJECT_HEADER + sizeof text, sizeof length);
  } else return NULL;
  if (length >= bytes) return NULL;
  memcpy(room, text, length);
  room[length] = 0;
  return room;
}

static const dl_tensor *tensor_of(const tvm_any *any) {
  if (any->type == ANY_DLTENSOR) return any->value.pointer;
  return any->type == ANY_TENSOR ? (const dl_tensor *)((const char *)any->value.pointer + OBJECT_HEADER) : NULL;
}

/* The data of a dense tensor of `bytes` bytes on a processor, else NULL. */
static void *data_of(const tvm_any *any, size_t bytes) {
  const dl_tensor *tensor = tensor_of(any);
  if (!tensor) return NULL;
  size_t size = (tensor->dtype.bits + 7u) / 8;
  for (int32_t axis = 0; axis < tensor->rank; axis++) size *= (size_t)tensor->shape[axis];
  return size == bytes && tensor->device.type == 1 ? (char *)tensor->data + tensor->byte_offset : NULL;
}

typedef struct {
  dance_model *model;
  const void *inputs[MOST_TENSORS];
  void *outputs[MOST_TENSORS];
} call;

/* The model, and inputs and outputs behind the first `fixed` arguments. */
static int read_call(call *found, const tvm_any *given, int32_t count, int32_t fixed) {
  const dance_program *program = &dance_the_program;
  if (count != fixed + program->input_count + program->output_count || count > MOST_TENSORS)
    return raise("a call takes every input and every output of the network");
  found->model = given[0].value.pointer;
  for (int32_t each = 0; each < program->input_count; each++)
    if (!(found->inputs[each] = data_of(&given[fixed + each], program->inputs[each].bytes)) && program->inputs[each].bytes)
      return raise("an input is not a tensor of this processor of the network's size");
  for (int32_t each = 0; each < program->output_count; each++) {
    const tvm_any *output = &given[fixed + program->input_count + each];
    if (!(found->outputs[each] = data_of(output, program->outputs[each].bytes)) && program->outputs[each].bytes)
      return raise("an output is not a tensor of this processor of the network's size");
  }
  return 0;
}

TVM_FUNCTION(create) {
  char path[4096], error[ERROR_BYTES] = "";
  const char *weights = count == 3 ? text_of(&given[0], path, sizeof path) : NULL;
  (void)self;
  if (!weights) return raise("dance_create takes a path, a number of threads and whether the weights are verified");
  dance_options options = {.size = sizeof options, .threads = (int32_t)given[1].value.integer,
                           .weights_path = weights[0] ? weights : NULL, .verified = given[2].value.integer != 0};
  dance_model *model = dance_model_api(DANCE_VERSION)->create(&options, error, sizeof error);
  return model ? give(result, (int64_t)(intptr_t)model) : raise(error);
}

TVM_FUNCTION(destroy) {
  (void)self;
  if (count == 1) dance_model_api(DANCE_VERSION)->destroy(given[0].value.pointer);
  return give(result, 0);
}

TVM_FUNCTION(watch) {
  dance_watcher watcher = NULL;
  (void)self;
  if (count != 2) return raise("dance_watch takes a model and an address");
  *(void **)&watcher = given[1].value.pointer;
  dance_model_api(DANCE_VERSION)->watch(given[0].value.pointer, watcher, NULL);
  return give(result, 0);
}

TVM_FUNCTION(run) {
  const dance_api *api = dance_model_api(DANCE_VERSION);
  call found;
  (void)self;
  if (read_call(&found, given, count, 1)) return -1;
  if (api->run(found.model, found.inputs, found.outputs)) return raise(api->error(found.model));
  return give(result, 0);
}

TVM_FUNCTION(time) {
  const dance_api *api = dance_model_api(DANCE_VERSION);
  call found;
  (void)self;
  if (read_call(&found, given, count, 3)) return -1;
  int32_t runs = (int32_t)given[1].value.integer;
  int64_t *nanoseconds = data_of(&given[2], 8 * (size_t)runs);
  if (!nanoseconds) return raise("dance_time writes into an int64 tensor of one element a run");
  if (api->time(found.model, found.inputs, found.outputs, runs, nanoseconds)) return raise(api->error(found.model));
  return give(result, 0);
}

TVM_FUNCTION(profile) {
  const dance_api *api = dance_model_api(DANCE_VERSION);
  const dance_layer_time *times;
  call found;
  int code = DANCE_OK;
  (void)self;
  if (read_call(&found, given, count, 3)) return -1;
  int32_t runs = (int32_t)given[1].value.integer, steps = api->layers(found.model, &times);
  int64_t *nanoseconds = data_of(&given[2], 8 * (size_t)runs * (size_t)steps);
  if (!nanoseconds) return raise("dance_profile writes into an int64 tensor of one row a run and one column a step");
  for (int32_t each = 0; each < runs && !code; each++) {
    api->profile(found.model, 1);
    code = api->run(found.model, found.inputs, found.outputs);
    for (int32_t step = 0; step < steps; step++) nanoseconds[each * steps + step] = times[step].nanoseconds;
  }
  api->profile(found.model, 0);
  return code ? raise(api->error(found.model)) : give(result, 0);
}

TVM_FUNCTION(steps) {
  (void)self, (void)given, (void)count;
  return give(result, dance_the_program.step_count);
}

TVM_FUNCTION(step_name) {
  (void)self;
  if (count != 2 || given[0].value.integer < 0 || given[0].value.integer >= dance_the_program.step_count)
    return raise("there is no such step");
  const char *name = dance_the_program.steps[given[0].value.integer].kernel;
  size_t length = strlen(name);
  const dl_tensor *room = tensor_of(&given[1]);
  char *to = room && room->rank == 1 ? data_of(&given[1], (size_t)room->shape[0]) : NULL;
  if (!to || length > (size_t)room->shape[0]) return raise("dance_step_name writes into a uint8 tensor that holds the name");
  memcpy(to, name, length);
  return give(result, (int64_t)length);
}
