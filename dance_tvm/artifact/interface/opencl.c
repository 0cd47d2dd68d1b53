/* A GPU by OpenCL: its library is opened when a model is created, and compiles the kernels then. */
#include "gpu.h"

typedef void *object; /* of any of OpenCL's types */

enum {
  DEVICE_ANY = -1,
  DEVICE_GPU = 4,
  MOST_THREADS_OF_A_BLOCK = 0x1004,
  LARGEST_MEMORY = 0x1010,
  PART_ALIGNMENT = 0x1019, /* in bits */
  DEVICE_NAME = 0x102B,
  DEVICE_VERSION = 0x102F,
  EXTENSIONS = 0x1030,
  BUILD_LOG = 0x1183,
  READ_AND_WRITE = 1,
  REGION = 0x1220
};
#define MOST_DEVICES 64

/* The functions of OpenCL 1.1 that are called, with what they take. */
#define FUNCTIONS(one)                                                                                                    \
  one(int32_t, clGetPlatformIDs, (uint32_t, object *, uint32_t *))                                                        \
  one(int32_t, clGetDeviceIDs, (object, uint64_t, uint32_t, object *, uint32_t *))                                        \
  one(int32_t, clGetDeviceInfo, (object, uint32_t, size_t, void *, size_t *))                                             \
  one(object, clCreateContext, (const intptr_t *, uint32_t, const object *, void *, void *, int32_t *))                   \
  one(int32_t, clReleaseContext, (object))                                                                                \
  one(object, clCreateProgramWithSource, (object, uint32_t, const char **, const size_t *, int32_t *))                    \
  one(int32_t, clBuildProgram, (object, uint32_t, const object *, const char *, void *, void *))                          \
  one(int32_t, clGetProgramBuildInfo, (object, object, uint32_t, size_t, void *, size_t *))                               \
  one(int32_t, clReleaseProgram, (object))                                                                                \
  one(object, clCreateKernel, (object, const char *, int32_t *))                                                          \
  one(int32_t, clSetKernelArg, (object, uint32_t, size_t, const void *))                                                  \
  one(int32_t, clReleaseKernel, (object))                                                                                 \
  one(object, clCreateBuffer, (object, uint64_t, size_t, void *, int32_t *))                                              \
  one(object, clCreateSubBuffer, (object, uint64_t, uint32_t, const void *, int32_t *))                                   \
  one(int32_t, clReleaseMemObject, (object))                                                                              \
  one(object, clCreateCommandQueue, (object, object, uint64_t, int32_t *))                                                \
  one(int32_t, clReleaseCommandQueue, (object))                                                                           \
  one(int32_t, clEnqueueWriteBuffer, (object, object, uint32_t, size_t, size_t, const void *, uint32_t, void *, void *))  \
  one(int32_t, clEnqueueReadBuffer, (object, object, uint32_t, size_t, size_t, void *, uint32_t, void *, void *))         \
  one(int32_t, clEnqueueCopyBuffer, (object, object, object, size_t, size_t, size_t, uint32_t, void *, void *))           \
  one(int32_t, clEnqueueNDRangeKernel,                                                                                    \
      (object, object, uint32_t, const size_t *, const size_t *, const size_t *, uint32_t, void *, void *))               \
  one(int32_t, clFinish, (object))

struct gpu {
#define DECLARED(result, name, parameters) result(*name) parameters;
  FUNCTIONS(DECLARED)
#undef DECLARED
  object device, context, program;
  size_t largest, alignment;
  char name[128];
};

struct gpu_queue {
  gpu *on;
  object commands;
  object *kernels; /* one for each launch, with its arguments */
};

static const char *const libraries[] = {"libOpenCL.so.1", "libOpenCL.so", "libOpenCL-pixel.so",
                                        "/system/vendor/lib64/libOpenCL.so", "/vendor/lib64/libOpenCL.so", NULL};

/* What OpenCL's errors mean here; NULL: known by its number alone. */
static const char *meaning(int32_t code) {
  switch (code) {
    case -4: case -5: case -6: case -61: return "it is out of memory";
    case -46: return "its driver does not have the kernel";
    case -54: case -55: return "it cannot run so many threads a block";
    default: return NULL;
  }
}

static int refused(const gpu *on, int32_t code, const char *what) {
  char number[16] = "";
  int at = 15;
  if (!code) return 0;
  for (int32_t left = -code; left > 0 && at > 1; left /= 10) number[--at] = (char)('0' + left % 10);
  if (meaning(code)) COMPLAIN(on->name, " cannot ", what, ": ", meaning(code));
  else COMPLAIN(on->name, " cannot ", what, ": its driver gives OpenCL's error -", number + at);
  return -1;
}

static int load_functions(gpu *on, void *library) {
#define LOADED(result, name, parameters) \
  if (!(*(void **)&on->name = function_of(library, #name))) return -1;
  FUNCTIONS(LOADED)
#undef LOADED
  return 0;
}

static int list_devices(gpu *on, object *devices, uint64_t type) {
  object platforms[MOST_DEVICES];
  uint32_t platform_count = 0, found = 0;
  if (on->clGetPlatformIDs(MOST_DEVICES, platforms, &platform_count)) return 0;
  if (platform_count > MOST_DEVICES) platform_count = MOST_DEVICES;
  for (uint32_t each = 0; each < platform_count && found < MOST_DEVICES; each++) {
    uint32_t more = 0;
    if (on->clGetDeviceIDs(platforms[each], type, MOST_DEVICES - found, devices + found, &more)) continue;
    found += more < MOST_DEVICES - found ? more : MOST_DEVICES - found;
  }
  return (int)found;
}

/* The first GPU, or else the first device; or the first with `part` in its name. */
static int choose_device(gpu *on, const char *part) {
  object devices[MOST_DEVICES];
  int found = part ? 0 : list_devices(on, devices, DEVICE_GPU);
  if (!found) found = list_devices(on, devices, (uint64_t)(uint32_t)DEVICE_ANY);
  for (int each = 0; each < found && !on->device; each++) {
    on->name[0] = 0;
    on->clGetDeviceInfo(devices[each], DEVICE_NAME, sizeof on->name - 1, on->name, NULL);
    if (!part || strstr(on->name, part)) on->device = devices[each];
  }
  if (on->device) return 0;
  if (part) COMPLAIN("there is no OpenCL device with ", part, " in its name");
  else COMPLAIN("there is no OpenCL device: install the GPU's driver, or build for a processor");
  return -1;
}

static int require_device(gpu *on) {
  const gpu_code *code = dance_the_program.gpu;
  size_t threads = 0, most = 0, length = 0;
  uint32_t alignment = 0;
  uint64_t largest = 0;
  on->clGetDeviceInfo(on->device, MOST_THREADS_OF_A_BLOCK, sizeof most, &most, NULL);
  on->clGetDeviceInfo(on->device, PART_ALIGNMENT, sizeof alignment, &alignment, NULL);
  on->clGetDeviceInfo(on->device, LARGEST_MEMORY, sizeof largest, &largest, NULL);
  on->alignment = alignment / 8 ? alignment / 8 : 1;
  on->largest = (size_t)largest;
  for (int32_t each = 0; each < code->launch_count; each++) {
    const uint32_t *block = code->launches[each].threads;
    size_t size = (size_t)block[0] * block[1] * block[2];
    if (size > threads) threads = size;
  }
  if (threads > most) {
    COMPLAIN(on->name, " runs fewer threads a block than a kernel of this model needs: build it for this device");
    return -1;
  }
  if (!code->half || on->clGetDeviceInfo(on->device, EXTENSIONS, 0, NULL, &length)) return 0;
  char *extensions = calloc(1, length + 1);
  if (extensions) on->clGetDeviceInfo(on->device, EXTENSIONS, length, extensions, NULL);
  int has_half = extensions && strstr(extensions, "cl_khr_fp16");
  free(extensions);
  if (!has_half) COMPLAIN(on->name, " has no half precision (cl_khr_fp16): build with --dtype float32");
  return has_half ? 0 : -1;
}

static int compile(gpu *on) {
  const char *source = dance_the_program.gpu->code;
  char log[256] = "";
  int32_t code = 0;
  on->context = on->clCreateContext(NULL, 1, &on->device, NULL, NULL, &code);
  if (refused(on, code, "be opened")) return -1;
  on->program = on->clCreateProgramWithSource(on->context, 1, &source, NULL, &code);
  if (refused(on, code, "take the kernels")) return -1;
  /* PoCL 3.1 on LLVM 15 optimises away what follows a barrier under a condition, as plans of index lists have. */
  char version[128] = "";
  on->clGetDeviceInfo(on->device, DEVICE_VERSION, sizeof version - 1, version, NULL);
  const char *flags = strstr(version, "PoCL") ? "-cl-opt-disable" : "";
  if (!on->clBuildProgram(on->program, 1, &on->device, flags, NULL, NULL)) return 0;
  on->clGetProgramBuildInfo(on->program, on->device, BUILD_LOG, sizeof log - 1, log, NULL);
  log[strcspn(log, "\n")] = 0;
  COMPLAIN(on->name, " refuses the kernels", log[0] ? ": " : "", log);
  return -1;
}

int open_gpu(gpu **found, const dance_options *options) {
  gpu *on = calloc(1, sizeof *on);
  *found = on;
  if (!on) return -1;
  void *library = open_driver(options->driver, libraries, "there is no OpenCL here (libOpenCL.so): install the GPU's driver, or "
                              "build for a processor");
  if (!library || load_functions(on, library) || choose_device(on, options->device)) return -1;
  return require_device(on) || compile(on) ? -1 : 0;
}

void close_gpu(gpu *on) {
  if (!on) return;
  if (on->program) on->clReleaseProgram(on->program);
  if (on->context) on->clReleaseContext(on->context);
  free(on); /* the library stays open: drivers do not bear being closed */
}

int take_memory(gpu *on, gpu_memory *found, size_t bytes) {
  int32_t code = 0;
  object memory = NULL;
  if (on->largest && bytes > on->largest) return refused(on, -61, "hold the model's tensors in one piece");
  memory = on->clCreateBuffer(on->context, READ_AND_WRITE, bytes < 4 ? 4 : bytes, NULL, &code);
  *found = (gpu_memory)(uintptr_t)memory;
  return refused(on, code, "hold the model's tensors");
}

void give_memory(gpu *on, gpu_memory memory) { on->clReleaseMemObject((object)(uintptr_t)memory); }

int take_part(gpu *on, gpu_memory *found, gpu_memory whole, size_t offset, size_t bytes) {
  const size_t region[2] = {offset, bytes < 4 ? 4 : bytes};
  int32_t code = 0;
  if (offset % on->alignment) {
    COMPLAIN(on->name, " wants tensors further apart than this model has them: report this to dance-tvm");
    return -1;
  }
  *found = (gpu_memory)(uintptr_t)on->clCreateSubBuffer((object)(uintptr_t)whole, READ_AND_WRITE, REGION, region, &code);
  return refused(on, code, "divide its memory");
}

void give_part(gpu *on, gpu_memory part) { give_memory(on, part); }

int open_queue(gpu_queue **found, gpu *on) {
  gpu_queue *queue = calloc(1, sizeof *queue);
  int32_t code = 0;
  *found = queue;
  if (!queue) return -1;
  queue->on = on;
  queue->kernels = calloc((size_t)dance_the_program.gpu->launch_count + 1, sizeof *queue->kernels);
  if (!queue->kernels) return -1;
  queue->commands = on->clCreateCommandQueue(on->context, on->device, 0, &code);
  return refused(on, code, "be given work");
}

void close_queue(gpu_queue *queue) {
  if (!queue) return;
  if (queue->commands) queue->on->clFinish(queue->commands);
  for (int32_t each = 0; queue->kernels && each < dance_the_program.gpu->launch_count; each++)
    if (queue->kernels[each]) queue->on->clReleaseKernel(queue->kernels[each]);
  if (queue->commands) queue->on->clReleaseCommandQueue(queue->commands);
  free(queue->kernels);
  free(queue);
}

int bind_launch(gpu_queue *queue, int32_t index, const gpu_memory *given) {
  const gpu_launch *launch = &dance_the_program.gpu->launches[index];
  int32_t code = 0;
  queue->kernels[index] = queue->on->clCreateKernel(queue->on->program, launch->kernel, &code);
  for (int32_t each = 0; each < launch->count && !code; each++) {
    object memory = (object)(uintptr_t)given[each];
    code = queue->on->clSetKernelArg(queue->kernels[index], (uint32_t)each, sizeof memory, &memory);
  }
  return refused(queue->on, code, "take a kernel");
}

int start_launch(gpu_queue *queue, int32_t index) {
  const gpu_launch *launch = &dance_the_program.gpu->launches[index];
  size_t threads[3], all[3];
  for (int axis = 0; axis < 3; axis++) threads[axis] = launch->threads[axis], all[axis] = threads[axis] * launch->blocks[axis];
  int32_t code = queue->on->clEnqueueNDRangeKernel(queue->commands, queue->kernels[index], 3, NULL, all, threads, 0, NULL, NULL);
  return refused(queue->on, code, "start a kernel");
}

int copy_in(gpu_queue *queue, gpu_memory to, const void *from, size_t bytes) {
  object memory = (object)(uintptr_t)to;
  return refused(queue->on, queue->on->clEnqueueWriteBuffer(queue->commands, memory, 1, 0, bytes, from, 0, NULL, NULL), "be written to");
}

int copy_out(gpu_queue *queue, void *to, gpu_memory from, size_t bytes) {
  object memory = (object)(uintptr_t)from;
  return refused(queue->on, queue->on->clEnqueueReadBuffer(queue->commands, memory, 1, 0, bytes, to, 0, NULL, NULL), "be read");
}

int copy_within(gpu_queue *queue, gpu_memory to, gpu_memory from, size_t bytes) {
  if (!bytes) return 0;
  int32_t code = queue->on->clEnqueueCopyBuffer(queue->commands, (object)(uintptr_t)from, (object)(uintptr_t)to, 0, 0, bytes, 0, NULL, NULL);
  return refused(queue->on, code, "copy its memory");
}

int finish_queue(gpu_queue *queue) { return refused(queue->on, queue->on->clFinish(queue->commands), "finish its work"); }
