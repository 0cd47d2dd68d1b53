/* dance_model.h: the C interface of every artifact, version 1.
 *
 * An artifact's model.so needs libc, libm and pthread alone; one for a GPU opens the driver's library when a model is
 * created. It exports one function, dance_model_api, which gives a
 * table of functions; dance_model_open below verifies the file, loads it and finds that function. A model is created
 * from the artifact's weights (where it has a file of them), runs with buffers of the caller's, and is destroyed.
 *
 *     const dance_api *api = dance_model_open("artifacts/mine/model.so", error, sizeof error);
 *     dance_options options = {.size = sizeof options, .threads = 2, .weights_path = "artifacts/mine/weights.safetensors"};
 *     dance_model *model = api->create(&options, error, sizeof error);
 *     if (api->run(model, inputs, outputs) != DANCE_OK) puts(api->error(model));
 *     api->destroy(model);
 *
 * Threads: a model runs one call at a time. A call while another is under way does nothing and gives DANCE_BUSY, but
 * destroy must not overlap any.
 * Different models may run at once in different threads. Models made with options.share use one copy of the weights.
 * cancel may be called from any thread while another runs the model.
 *
 * Buffers are dense, in the order of their shapes (C order). A buffer whose address is a multiple of 64 is read in
 * place, another one is copied first.
 *
 * Stability: structures grow at their ends alone and begin with their size; a function's meaning never changes within
 * a version; dance_model_api returns NULL for a version that the library does not have.
 */
#ifndef DANCE_MODEL_H
#define DANCE_MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DANCE_VERSION 1u

typedef struct dance_model dance_model;

enum {
  DANCE_OK = 0,
  DANCE_BAD_ARGUMENT = 1,
  DANCE_NO_MEMORY = 2,
  DANCE_BAD_WEIGHTS = 3,
  DANCE_FAILED = 4,   /* a kernel refused; error() says why */
  DANCE_CANCELLED = 5,
  DANCE_BUSY = 6      /* another thread's call on this model is under way; nothing was done */
};

typedef enum { DANCE_INT = 0, DANCE_UINT = 1, DANCE_FLOAT = 2, DANCE_BFLOAT = 4, DANCE_BOOL = 6 } dance_kind;

typedef struct {
  const char *name;
  const int64_t *shape;
  int32_t rank;
  int32_t kind; /* a dance_kind */
  int32_t bits; /* of one element */
  size_t bytes; /* of the whole tensor */
} dance_tensor;

typedef struct {
  size_t size;              /* sizeof(dance_options) */
  int32_t threads;          /* of this model; 0: as the artifact was built for */
  const char *weights_path; /* weights.safetensors, for an artifact that has it; or */
  int weights_fd;           /* a descriptor (an Android asset's) with offset and length, where weights_length is not 0 */
  int64_t weights_offset;
  int64_t weights_length;
  const void *weights;      /* or the file's bytes in memory, which must outlive the model */
  size_t weights_bytes;
  dance_model *share;       /* or another model of this library, whose weights are used; it may be destroyed first */
  const int32_t *cpus;      /* the threads run on these CPUs (create alone reads them); NULL: wherever the system puts them */
  int32_t cpu_count;
  int32_t verified;         /* not 0: the caller has verified the artifact, so its weights are not hashed again */
  const char *driver;       /* of a GPU: the driver's library; NULL: DANCE_GPU_DRIVER's, else the system's */
  const char *device;       /* a part of the GPU's name; NULL: the first GPU */
} dance_options;

typedef struct {
  const char *kernel;
  int64_t calls;       /* since profile() was switched on */
  int64_t nanoseconds; /* of all these calls */
} dance_layer_time;

/* A tensor that a kernel was given: inputs first, what it wrote last. Its data may be overwritten by the next kernel. */
typedef struct {
  const void *data;
  const int64_t *shape;
  int32_t rank, kind, bits;
} dance_view;

typedef void (*dance_watcher)(void *context, const char *kernel, const dance_view *tensors, int32_t count);

typedef struct {
  uint32_t version;
  uint32_t size; /* sizeof(dance_api) of the library */
  const char *(*describe)(void);                      /* name of the network, target and versions, one line */
  int32_t (*inputs)(const dance_tensor **tensors);    /* their number, and where they stand */
  int32_t (*outputs)(const dance_tensor **tensors);
  dance_model *(*create)(const dance_options *options, char *error, size_t error_bytes); /* NULL: error says why */
  /* Inputs and outputs at addresses that are multiples of 64 are read and written where they lie; others are copied. An
   * output may lie where an input does, but not where another output does. */
  int (*run)(dance_model *model, const void *const *inputs, void *const *outputs);
  /* A streaming network (its outputs after the first are the next values of its inputs after the first): one frame.
   * A run between two steps leaves the state as it is on a processor; on a GPU it needs a model of its own, or a reset. */
  int (*step)(dance_model *model, const void *frame, void *output);
  int (*reset)(dance_model *model);                   /* the stream's state becomes zero */
  int (*profile)(dance_model *model, int on);         /* forget times and work so far; keep them from here on if on is not 0 */
  int32_t (*layers)(dance_model *model, const dance_layer_time **times); /* one per call of a kernel, in their order */
  void (*cancel)(dance_model *model);                 /* the call under way ends with DANCE_CANCELLED soon */
  const char *(*error)(const dance_model *model);     /* of the last call that did not end with DANCE_OK */
  size_t (*memory)(const dance_model *model);         /* bytes that this model holds, weights that it shares left out */
  void (*destroy)(dance_model *model);                /* NULL is allowed; no call may be under way */
  /* Called after each kernel from the thread that runs the model, until another one or NULL takes its place. The call is
   * under way meanwhile: of this model it may use cancel, and must not destroy it. */
  void (*watch)(dance_model *model, dance_watcher watcher, void *context);
  /* `count` runs, and the nanoseconds of each; on a GPU without bringing inputs there and outputs back. */
  int (*time)(dance_model *model, const void *const *inputs, void *const *outputs, int32_t count, int64_t *nanoseconds);
  /* Multiply-accumulates that each entry of `layers` executed since profile() was switched on: what masks and weights of
   * zeros left of a convolution or linear layer (of a Winograd kernel, the share of its tiles times the dense layer's);
   * -1: another kernel, or several small ones in one. In libraries whose `size` ends behind it. */
  int32_t (*work)(dance_model *model, const int64_t **macs);
} dance_api;

const dance_api *dance_model_api(uint32_t version);

#ifdef __cplusplus
}
#endif

#if !defined(DANCE_MODEL_NO_OPEN)
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* A library ends with this mark and a checksum of all bytes before it, which loaders pass over. */
#define DANCE_SEAL "dance:1\n"
enum { DANCE_WORD = 8, DANCE_BUFFER = 2048 };

/* The sum of the words of a file's first `bytes` bytes, each mixed with its place by SplitMix64's last steps, which take
 * no two words to the same one: a change within one word is always found, any other but for one in 2^64. It finds damage
 * and is no signature. Gives 0 where the bytes cannot be read. */
static inline int dance_checksum(FILE *file, uint64_t bytes, uint64_t *sum) {
  uint64_t words[DANCE_BUFFER], place = 0, left = bytes;
  for (*sum = bytes; left;) {
    const size_t held = left < sizeof words ? (size_t)left : sizeof words, count = (held + DANCE_WORD - 1) / DANCE_WORD;
    words[count - 1] = 0;
    if (fread(words, 1, held, file) != held) return 0;
    left -= held;
    for (size_t each = 0; each < count; each++) {
      uint64_t word = words[each] + (place += UINT64_C(0x9e3779b97f4a7c15));
      word = (word ^ word >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
      word = (word ^ word >> 27) * UINT64_C(0x94d049bb133111eb);
      *sum += word ^ word >> 31;
    }
  }
  return 1;
}

/* NULL where the library at `path` is as it was built, else what is wrong with it; nothing of it is run. A name without
 * a folder, which the loader looks for, is not verified, nor a path that is no file (a library within an .apk). */
static inline const char *dance_model_damage(const char *path) {
  uint64_t end[2], found;
  const char *damage = "has no seal at its end: it is cut off, stripped or of an earlier version; fetch or build it again";
  FILE *file = strchr(path, '/') ? fopen(path, "rb") : NULL;
  if (!file) return NULL;
  const long size = fseek(file, 0, SEEK_END) ? -1 : ftell(file), body = size - (long)sizeof end;
  if (body >= 0 && !fseek(file, body, SEEK_SET) && fread(end, 1, sizeof end, file) == sizeof end &&
      !memcmp(end, DANCE_SEAL, DANCE_WORD)) {
    damage = "is damaged: its bytes are not those that were built; fetch or build it again";
    if (!fseek(file, 0, SEEK_SET) && dance_checksum(file, (uint64_t)body, &found) && found == end[1]) damage = NULL;
  }
  fclose(file);
  return damage;
}

/* The functions of the model.so at `path`, for who has verified the file; NULL with a sentence in `error` where it
 * cannot be loaded. */
static inline const dance_api *dance_model_open_verified(const char *path, char *error, size_t error_bytes) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  const dance_api *(*get)(uint32_t) = NULL;
  const dance_api *api = NULL;
  if (!library) {
    snprintf(error, error_bytes, "%s", dlerror());
    return NULL;
  }
  *(void **)&get = dlsym(library, "dance_model_api");
  if (get) api = get(DANCE_VERSION);
  if (!api) {
    snprintf(error, error_bytes, "%.300s has no C interface of version %u: build it anew", path, DANCE_VERSION);
    dlclose(library);
  }
  return api;
}

/* The same, after every byte of the file was verified. */
static inline const dance_api *dance_model_open(const char *path, char *error, size_t error_bytes) {
  const char *damage = dance_model_damage(path);
  if (!damage) return dance_model_open_verified(path, error, error_bytes);
  snprintf(error, error_bytes, "%.300s %s", path, damage);
  return NULL;
}
#endif

#ifdef __cplusplus
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dance {

/* One model; throws std::runtime_error with the library's sentence. Moves, and is destroyed with its scope. */
class Model {
 public:
  Model(const dance_api *api, const dance_options &options) : api_(api) {
    char sentence[512] = "";
    model_ = api_->create(&options, sentence, sizeof sentence);
    if (!model_) throw std::runtime_error(sentence);
  }
  Model(Model &&other) noexcept : api_(other.api_), model_(std::exchange(other.model_, nullptr)) {}
  Model &operator=(Model &&other) noexcept {
    std::swap(api_, other.api_);
    std::swap(model_, other.model_);
    return *this;
  }
  Model(const Model &) = delete;
  Model &operator=(const Model &) = delete;
  ~Model() { api_->destroy(model_); }

  std::vector<dance_tensor> inputs() const { return listed(api_->inputs); }
  std::vector<dance_tensor> outputs() const { return listed(api_->outputs); }
  void run(const std::vector<const void *> &inputs, const std::vector<void *> &outputs) {
    require(api_->run(model_, inputs.data(), outputs.data()));
  }
  void step(const void *frame, void *output) { require(api_->step(model_, frame, output)); }
  void reset() { require(api_->reset(model_)); }
  void cancel() { api_->cancel(model_); }
  void profile(bool on = true) { require(api_->profile(model_, on)); }
  std::vector<dance_layer_time> layers() const {
    const dance_layer_time *first = nullptr;
    const int32_t count = api_->layers(model_, &first);
    return {first, first + count};
  }
  /* Throws where the library was built before it counted. */
  std::vector<int64_t> work() const {
    if (api_->size <= offsetof(dance_api, work)) throw std::runtime_error("the library does not count work: build it anew");
    const int64_t *first = nullptr;
    const int32_t count = api_->work(model_, &first);
    return {first, first + count};
  }
  dance_model *get() const { return model_; }

 private:
  static std::vector<dance_tensor> listed(int32_t (*list)(const dance_tensor **)) {
    const dance_tensor *first = nullptr;
    const int32_t count = list(&first);
    return {first, first + count};
  }
  void require(int code) const {
    if (code != DANCE_OK) throw std::runtime_error(api_->error(model_));
  }
  const dance_api *api_;
  dance_model *model_;
};

#if !defined(DANCE_MODEL_NO_OPEN)
inline const dance_api *open(const std::string &path) {
  char sentence[512] = "";
  const dance_api *api = dance_model_open(path.c_str(), sentence, sizeof sentence);
  if (!api) throw std::runtime_error(sentence);
  return api;
}
#endif

}  // namespace dance
#endif

#endif /* DANCE_MODEL_H */
