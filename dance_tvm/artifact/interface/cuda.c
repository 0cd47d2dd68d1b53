/* A GPU by CUDA's driver: libcuda is opened when a model is created, and assembles the PTX then. */
#include "gpu.h"

enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, ERROR_LOG = 5, ERROR_LOG_BYTES = 6 };
enum { NO_MEMORY = 2, NO_CODE_FOR_GPU = 209, BAD_PTX = 218, PTX_TOO_NEW = 222 };

typedef void *object; /* a context, module, function or stream */
typedef int32_t status;

/* The functions of CUDA 10's driver that are called, with what they take. */
#define FUNCTIONS(one)                                                                                               \
  one(cuInit, (uint32_t))                                                                                            \
  one(cuDeviceGetCount, (int32_t *))                                                                                 \
  one(cuDeviceGet, (int32_t *, int32_t))                                                                             \
  one(cuDeviceGetName, (char *, int32_t, int32_t))                                                                   \
  one(cuDeviceGetAttribute, (int32_t *, int32_t, int32_t))                                                           \
  one(cuDevicePrimaryCtxRetain, (object *, int32_t))                                                                 \
  one(cuDevicePrimaryCtxRelease, (int32_t))                                                                          \
  one(cuCtxPushCurrent_v2, (object))                                                                                 \
  one(cuCtxPopCurrent_v2, (object *))                                                                                \
  one(cuModuleLoadDataEx, (object *, const void *, uint32_t, int32_t *, void **))                                    \
  one(cuModuleUnload, (object))                                                                                      \
  one(cuModuleGetFunction, (object *, object, const char *))                                                         \
  one(cuMemAlloc_v2, (uint64_t *, size_t))                                                                           \
  one(cuMemFree_v2, (uint64_t))                                                                                      \
  one(cuMemcpyHtoDAsync_v2, (uint64_t, const void *, size_t, object))                                                \
  one(cuMemcpyDtoHAsync_v2, (void *, uint64_t, size_t, object))                                                      \
  one(cuMemcpyDtoDAsync_v2, (uint64_t, uint64_t, size_t, object))                                                    \
  one(cuStreamCreate, (object *, uint32_t))                                                                          \
  one(cuStreamSynchronize, (object))                                                                                 \
  one(cuStreamDestroy_v2, (object))                                                                                  \
  one(cuLaunchKernel, (object, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, object, void **, void **)) \
  one(cuGetErrorString, (status, const char **))

struct gpu {
#define DECLARED(name, parameters) status(*name) parameters;
  FUNCTIONS(DECLARED)
#undef DECLARED
  int32_t device;
  object context, module;
  object *kernels; /* one for each launch */
  char name[128];
};

struct gpu_queue {
  gpu *on;
  object stream;
  gpu_memory *given; /* of all launches, behind one another as in gpu_code.given */
  void **addresses;
};

static const char *const libraries[] = {"libcuda.so.1", "libcuda.so", NULL};

static int refused(const gpu *on, status code, const char *what) {
  const char *why = NULL;
  if (!code) return 0;
  on->cuGetErrorString(code, &why);
  COMPLAIN(on->name[0] ? on->name : "CUDA", " cannot ", what, ": ",
           code == NO_MEMORY ? "it is out of memory" : why ? why : "its driver does not say why");
  return -1;
}

/* What a call of the driver's gives within the model's context; the caller's own is there again afterwards. */
#define WITHIN(on, call) ((on)->cuCtxPushCurrent_v2((on)->context) ? 201 : left((on), (on)->call))

static status left(gpu *on, status code) {
  object ours = NULL;
  on->cuCtxPopCurrent_v2(&ours);
  return code;
}

static int load_functions(gpu *on, void *library) {
#define LOADED(name, parameters) \
  if (!(*(void **)&on->name = function_of(library, #name))) return -1;
  FUNCTIONS(LOADED)
#undef LOADED
  return 0;
}

static int choose_device(gpu *on, const char *part) {
  int32_t count = 0;
  on->device = -1;
  if (refused(on, on->cuInit(0), "be used") || refused(on, on->cuDeviceGetCount(&count), "be used")) return -1;
  for (int32_t each = 0; each < count && on->device < 0; each++) {
    int32_t device = 0;
    if (on->cuDeviceGet(&device, each)) continue;
    on->cuDeviceGetName(on->name, sizeof on->name, device);
    if (!part || strstr(on->name, part)) on->device = device;
  }
  if (on->device >= 0) return 0;
  if (part) COMPLAIN("there is no NVIDIA GPU with ", part, " in its name");
  else COMPLAIN("there is no NVIDIA GPU here: build for a processor");
  return -1;
}

/* PTX runs on the architecture that it was made for and on newer ones. */
static int require_device(gpu *on) {
  const char *needs = dance_the_program.gpu->needs;
  int32_t major = 0, minor = 0;
  on->cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, on->device);
  on->cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, on->device);
  const char *digits = strchr(needs, '_');
  if (!digits || 10 * major + minor >= atoi(digits + 1)) return 0;
  COMPLAIN(on->name, " is older than ", needs, ", which the model is built for: build it for this GPU");
  return -1;
}

static int assemble(gpu *on) {
  char log[256] = "";
  int32_t options[2] = {ERROR_LOG, ERROR_LOG_BYTES};
  void *values[2] = {log, (void *)(uintptr_t)(sizeof log - 1)};
  const gpu_code *code = dance_the_program.gpu;
  if (refused(on, on->cuDevicePrimaryCtxRetain(&on->context, on->device), "be opened")) return -1;
  status given = WITHIN(on, cuModuleLoadDataEx(&on->module, code->code, 2, options, values));
  if (given == PTX_TOO_NEW) {
    COMPLAIN("the driver of ", on->name, " is too old for this model's PTX: update it, or build for a target with an older PTX");
    return -1;
  }
  if (given == NO_CODE_FOR_GPU || given == BAD_PTX) {
    log[strcspn(log, "\n")] = 0;
    COMPLAIN(on->name, " refuses the kernels, which are for ", code->needs, log[0] ? ": " : "", log);
    return -1;
  }
  if (refused(on, given, "take the kernels")) return -1;
  on->kernels = calloc((size_t)code->launch_count + 1, sizeof *on->kernels);
  if (!on->kernels) return -1;
  for (int32_t each = 0; each < code->launch_count; each++)
    if (refused(on, WITHIN(on, cuModuleGetFunction(&on->kernels[each], on->module, code->launches[each].kernel)), "find a kernel"))
      return -1;
  return 0;
}

int open_gpu(gpu **found, const dance_options *options) {
  gpu *on = calloc(1, sizeof *on);
  *found = on;
  if (!on) return -1;
  void *library = open_driver(options->driver, libraries, "there is no NVIDIA driver here (libcuda.so.1): install it, or build for "
                              "a processor");
  if (!library || load_functions(on, library) || choose_device(on, options->device)) return -1;
  return require_device(on) || assemble(on) ? -1 : 0;
}

void close_gpu(gpu *on) {
  if (!on) return;
  if (on->module) WITHIN(on, cuModuleUnload(on->module));
  if (on->context) on->cuDevicePrimaryCtxRelease(on->device);
  free(on->kernels);
  free(on); /* the library stays open: drivers do not bear being closed */
}

int take_memory(gpu *on, gpu_memory *found, size_t bytes) {
  return refused(on, WITHIN(on, cuMemAlloc_v2(found, bytes ? bytes : 1)), "hold the model's tensors");
}

void give_memory(gpu *on, gpu_memory memory) { WITHIN(on, cuMemFree_v2(memory)); }

int take_part(gpu *on, gpu_memory *found, gpu_memory whole, size_t offset, size_t bytes) {
  (void)on, (void)bytes;
  *found = whole + offset;
  return 0;
}

void give_part(gpu *on, gpu_memory part) { (void)on, (void)part; }

static int32_t given_count(void) {
  const gpu_code *code = dance_the_program.gpu;
  if (!code->launch_count) return 0;
  return code->launches[code->launch_count - 1].first + code->launches[code->launch_count - 1].count;
}

int open_queue(gpu_queue **found, gpu *on) {
  gpu_queue *queue = calloc(1, sizeof *queue);
  *found = queue;
  if (!queue) return -1;
  queue->on = on;
  queue->given = calloc((size_t)given_count() + 1, sizeof *queue->given);
  queue->addresses = calloc((size_t)given_count() + 1, sizeof *queue->addresses);
  if (!queue->given || !queue->addresses) return -1;
  return refused(on, WITHIN(on, cuStreamCreate(&queue->stream, 1)), "be given work");
}

void close_queue(gpu_queue *queue) {
  if (!queue) return;
  if (queue->stream) {
    WITHIN(queue->on, cuStreamSynchronize(queue->stream));
    WITHIN(queue->on, cuStreamDestroy_v2(queue->stream));
  }
  free(queue->given);
  free(queue->addresses);
  free(queue);
}

int bind_launch(gpu_queue *queue, int32_t index, const gpu_memory *given) {
  const gpu_launch *launch = &dance_the_program.gpu->launches[index];
  for (int32_t each = 0; each < launch->count; each++) {
    queue->given[launch->first + each] = given[each];
    queue->addresses[launch->first + each] = &queue->given[launch->first + each];
  }
  return 0;
}

int start_launch(gpu_queue *queue, int32_t index) {
  gpu *on = queue->on;
  const gpu_launch *launch = &dance_the_program.gpu->launches[index];
  const uint32_t *blocks = launch->blocks, *threads = launch->threads;
  void **given = queue->addresses + launch->first;
  status code = WITHIN(on, cuLaunchKernel(on->kernels[index], blocks[0], blocks[1], blocks[2], threads[0], threads[1], threads[2], 0,
                                          queue->stream, given, NULL));
  return refused(on, code, "start a kernel");
}

int copy_in(gpu_queue *queue, gpu_memory to, const void *from, size_t bytes) {
  status code = WITHIN(queue->on, cuMemcpyHtoDAsync_v2(to, from, bytes, queue->stream));
  return refused(queue->on, code, "be written to") || finish_queue(queue) ? -1 : 0;
}

int copy_out(gpu_queue *queue, void *to, gpu_memory from, size_t bytes) {
  status code = WITHIN(queue->on, cuMemcpyDtoHAsync_v2(to, from, bytes, queue->stream));
  return refused(queue->on, code, "be read") || finish_queue(queue) ? -1 : 0;
}

int copy_within(gpu_queue *queue, gpu_memory to, gpu_memory from, size_t bytes) {
  if (!bytes) return 0;
  return refused(queue->on, WITHIN(queue->on, cuMemcpyDtoDAsync_v2(to, from, bytes, queue->stream)), "copy its memory");
}

int finish_queue(gpu_queue *queue) {
  return refused(queue->on, WITHIN(queue->on, cuStreamSynchronize(queue->stream)), "finish its work");
}
