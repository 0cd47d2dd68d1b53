/* One client: its hello, then requests until it ends. This process is the session's own, so that whatever it does wrong
 * ends with it. */
#include "server.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>

#define MOST_SMALL (MOST_CHUNK + 64) /* of a request without inputs */
#define MOST_RUNS 1000000
#define MOST_FIGURES ((uint64_t)8 << 20) /* numbers that PROFILE may give */
#define MOST_PINNED 1024
#define MOST_TENSORS 64

typedef struct {
  const dance_api *api;
  dance_model *model;
  const dance_tensor *inputs, *outputs;
  int32_t input_count, output_count, steps, step; /* the one that LOOK has come to */
  void *given[MOST_TENSORS], *made[MOST_TENSORS];
  uint64_t given_bytes, made_bytes, *wanted;
} loaded;

typedef struct {
  const session *with;
  loaded models[MOST_MODELS];
  unsigned char *request;
  uint64_t length;
  int ended;
} state;

int take_all(int socket, void *to, size_t bytes) {
  for (char *at = to; bytes;) {
    ssize_t got = recv(socket, at, bytes, 0);
    if (got <= 0) return 0;
    at += got, bytes -= (size_t)got;
  }
  return 1;
}

int give_all(int socket, const void *from, size_t bytes) {
  for (const char *at = from; bytes;) {
    ssize_t got = send(socket, at, bytes, MSG_NOSIGNAL);
    if (got <= 0) return 0;
    at += got, bytes -= (size_t)got;
  }
  return 1;
}

static void reply_head(state *now, uint32_t status, uint64_t length) {
  struct { uint32_t status, zero; uint64_t length; } head = {status, 0, length};
  if (!give_all(now->with->socket, &head, sizeof head)) now->ended = 1;
}

static void reply(state *now, uint32_t status, const void *data, uint64_t length) {
  reply_head(now, status, length);
  if (!now->ended && !give_all(now->with->socket, data, length)) now->ended = 1;
}

static void refuse(state *now, const char *sentence) { reply(now, REFUSED, sentence, strlen(sentence)); }

static void reply_number(state *now, int64_t value) { reply(now, DONE, &value, sizeof value); }

static uint64_t number_at(const state *now, size_t at, size_t bytes) {
  uint64_t value = 0;
  memcpy(&value, now->request + at, bytes);
  return value;
}

/* The model that the request begins with; NULL, and refused, where there is none. */
static loaded *model_of(state *now) {
  uint64_t number = number_at(now, 0, 4);
  loaded *found = number < MOST_MODELS ? &now->models[number] : NULL;
  if (found && found->model) return found;
  refuse(now, "there is no such model");
  return NULL;
}

/* -- requests -------------------------------------------------------------------------------------------------------- */

static void give_facts(state *now) {
  text said = {0};
  tell_facts(now->with->files, &said);
  reply(now, DONE, said.data, said.used);
  free(said.data);
}

static void give_sensors(state *now) {
  text said = {0};
  tell_sensors(&said);
  reply(now, DONE, said.data, said.used);
  free(said.data);
}

static void pin(state *now) {
  static unsigned long everywhere[MOST_PINNED / 64], bits[MOST_PINNED / 64];
  static int known;
  uint64_t count = number_at(now, 0, 4);
  if (!known && syscall(SYS_sched_getaffinity, 0, sizeof everywhere, everywhere) <= 0) return refuse(now, "this device pins no threads");
  known = 1;
  if (now->length != 4 + 4 * count) return refuse(now, "a request to pin names its CPUs");
  memset(bits, 0, sizeof bits);
  for (uint64_t each = 0; each < count; each++) {
    uint64_t cpu = number_at(now, 4 + 4 * each, 4);
    if (cpu >= MOST_PINNED || !(everywhere[cpu / 64] >> cpu % 64 & 1)) return refuse(now, "it has no such CPUs");
    bits[cpu / 64] |= 1ul << cpu % 64;
  }
  if (syscall(SYS_sched_setaffinity, 0, sizeof bits, count ? bits : everywhere)) return refuse(now, "it has no such CPUs");
  reply(now, DONE, NULL, 0);
}

static void have(state *now) { reply_number(now, store_has(now->with->files, now->request, number_at(now, 32, 8))); }

static void append(state *now) {
  char error[SENTENCE_BYTES];
  size_t bytes = (size_t)now->length - 40;
  if (store_append(now->with->files, now->request, number_at(now, 32, 8), now->request + 40, bytes, error)) reply(now, DONE, NULL, 0);
  else refuse(now, error);
}

static void finish(state *now) {
  char error[SENTENCE_BYTES];
  if (store_finish(now->with->files, now->request, error)) reply(now, DONE, NULL, 0);
  else refuse(now, error);
}

static void forget(loaded *one) {
  for (int32_t each = 0; each < MOST_TENSORS; each++) free(one->given[each]), free(one->made[each]);
  if (one->api) one->api->destroy(one->model);
  free(one->wanted);
  memset(one, 0, sizeof *one);
}

static int make_room(const dance_tensor *tensors, int32_t count, void **room, uint64_t *all) {
  if (count < 0 || count > MOST_TENSORS) return 0;
  for (int32_t each = 0; each < count; each++) {
    if (posix_memalign(&room[each], 64, tensors[each].bytes + 64)) return 0;
    *all += tensors[each].bytes;
  }
  return 1;
}

/* Verified before a byte of it is loaded: seal and library by find_sealed, weights by create. */
static int open_model(const store *files, const unsigned char *manifest, int32_t threads, loaded *one, char *error) {
  const dance_layer_time *times;
  sealed found;
  if (!find_sealed(files, manifest, &found, error)) return 0;
  one->api = dance_model_open(found.library, error, SENTENCE_BYTES);
  if (!one->api) return 0;
  dance_options options = {.size = sizeof options, .threads = threads, .weights_path = found.weights[0] ? found.weights : NULL};
  one->model = one->api->create(&options, error, SENTENCE_BYTES);
  if (!one->model) return 0;
  one->input_count = one->api->inputs(&one->inputs);
  one->output_count = one->api->outputs(&one->outputs);
  one->steps = one->api->layers(one->model, &times);
  one->wanted = calloc((size_t)one->steps + 1, sizeof *one->wanted);
  if (one->wanted && make_room(one->inputs, one->input_count, one->given, &one->given_bytes) &&
      make_room(one->outputs, one->output_count, one->made, &one->made_bytes))
    return 1;
  snprintf(error, SENTENCE_BYTES, "there is no memory for the network's inputs and outputs, or it has more than %d", MOST_TENSORS);
  return 0;
}

static void load(state *now) {
  char error[SENTENCE_BYTES] = "";
  uint32_t number = 0;
  while (number < MOST_MODELS && now->models[number].model) number++;
  if (number == MOST_MODELS) return refuse(now, "this session holds as many models as it may: close some");
  loaded *one = &now->models[number];
  if (!open_model(now->with->files, now->request, (int32_t)number_at(now, 32, 4), one, error)) {
    forget(one);
    return refuse(now, error);
  }
  uint32_t told[2] = {number, (uint32_t)one->steps};
  reply(now, DONE, told, sizeof told);
}

static void unload(state *now) {
  loaded *one = model_of(now);
  if (!one) return;
  forget(one);
  reply(now, DONE, NULL, 0);
}

static void names(state *now) {
  const dance_layer_time *times;
  loaded *one = model_of(now);
  text said = {0};
  if (!one) return;
  one->api->layers(one->model, &times);
  for (int32_t step = 0; step < one->steps; step++) add(&said, "%s\n", times[step].kernel);
  reply(now, DONE, said.data, said.used);
  free(said.data);
}

static void want(state *now) {
  loaded *one = model_of(now);
  if (!one) return;
  if (now->length != 8 + 8 * (uint64_t)one->steps) return refuse(now, "there is one mask for each step");
  memcpy(one->wanted, now->request + 8, 8 * (size_t)one->steps);
  reply(now, DONE, NULL, 0);
}

/* -- requests that bring inputs: these follow the first eight bytes, straight into their places ---------------------- */

static void run(state *now, loaded *one, uint64_t runs) {
  (void)runs;
  if (one->api->run(one->model, (const void *const *)one->given, one->made)) return refuse(now, one->api->error(one->model));
  reply_head(now, DONE, one->made_bytes);
  for (int32_t each = 0; each < one->output_count && !now->ended; each++)
    if (!give_all(now->with->socket, one->made[each], one->outputs[each].bytes)) now->ended = 1;
}

static void time_runs(state *now, loaded *one, uint64_t runs) {
  int64_t *spent = calloc((size_t)runs + 1, sizeof *spent);
  if (!spent) return refuse(now, "there is no memory for so many runs");
  if (one->api->time(one->model, (const void *const *)one->given, one->made, (int32_t)runs, spent))
    refuse(now, one->api->error(one->model));
  else reply(now, DONE, spent, 8 * runs);
  free(spent);
}

static void profile(state *now, loaded *one, uint64_t runs) {
  const dance_layer_time *times;
  const uint64_t steps = (uint64_t)one->steps;
  if (runs * steps > MOST_FIGURES) return refuse(now, "these are too many runs for one request");
  int64_t *spent = calloc((size_t)(runs * steps) + 1, sizeof *spent);
  int code = spent ? DANCE_OK : DANCE_NO_MEMORY;
  for (uint64_t each = 0; each < runs && !code; each++) {
    one->api->profile(one->model, 1);
    code = one->api->run(one->model, (const void *const *)one->given, one->made);
    one->api->layers(one->model, &times);
    for (uint64_t step = 0; step < steps; step++) spent[each * steps + step] = times[step].nanoseconds;
  }
  one->api->profile(one->model, 0);
  if (code) refuse(now, spent ? one->api->error(one->model) : "there is no memory for so many runs");
  else reply(now, DONE, spent, 8 * runs * steps);
  free(spent);
}

static uint64_t bytes_of(const dance_view *view) {
  uint64_t bytes = (uint64_t)(view->bits + 7) / 8;
  for (int32_t axis = 0; axis < view->rank; axis++) bytes *= (uint64_t)view->shape[axis];
  return bytes;
}

static struct {
  state *now;
  loaded *one;
} looking;

/* A part: tensors, bytes of the name, the name; of each tensor kind, bits, rank, whether its elements follow, its shape. */
static void look_at_kernel(void *context, const char *kernel, const dance_view *tensors, int32_t count) {
  state *now = looking.now;
  const int socket = now->with->socket;
  const uint64_t wanted = looking.one->step < looking.one->steps ? looking.one->wanted[looking.one->step] : 0;
  const uint32_t head[2] = {(uint32_t)count, (uint32_t)strlen(kernel)};
  uint64_t length = sizeof head + head[1];
  (void)context;
  looking.one->step++;
  for (int32_t each = 0; each < count; each++)
    length += 16 + 8 * (uint64_t)tensors[each].rank + (each < 64 && wanted >> each & 1 ? bytes_of(&tensors[each]) : 0);
  if (!now->ended) reply_head(now, PART, length);
  if (now->ended) return;
  int sent = give_all(socket, head, sizeof head) && give_all(socket, kernel, head[1]);
  for (int32_t each = 0; each < count && sent; each++) {
    const dance_view *view = &tensors[each];
    const int with_data = each < 64 && wanted >> each & 1;
    const int32_t about[4] = {view->kind, view->bits, view->rank, with_data};
    sent = give_all(socket, about, sizeof about) && give_all(socket, view->shape, 8 * (size_t)view->rank) &&
           (!with_data || give_all(socket, view->data, bytes_of(view)));
  }
  now->ended = !sent;
}

static void look(state *now, loaded *one, uint64_t runs) {
  (void)runs;
  looking.now = now, looking.one = one, one->step = 0;
  one->api->watch(one->model, look_at_kernel, NULL);
  int code = one->api->run(one->model, (const void *const *)one->given, one->made);
  one->api->watch(one->model, NULL, NULL);
  if (now->ended) return;
  if (code) refuse(now, one->api->error(one->model));
  else reply(now, DONE, NULL, 0);
}

static void give_reset(state *now) { reply_number(now, reset_peak()); }
static void give_peak(state *now) { reply_number(now, peak_memory()); }

typedef struct {
  uint64_t least, most; /* bytes of the request; of one with inputs before them */
  void (*small)(state *now);
  void (*with_inputs)(state *now, loaded *one, uint64_t runs);
} operation;

static const operation OPERATION[OPERATIONS] = {
    [FACTS] = {0, 0, give_facts, NULL},        [SENSORS] = {0, 0, give_sensors, NULL},
    [PIN] = {4, 4 + 4 * MOST_PINNED, pin, NULL}, [HAVE] = {40, 40, have, NULL},
    [APPEND] = {40, 40 + MOST_CHUNK, append, NULL}, [FINISH] = {32, 32, finish, NULL},
    [LOAD] = {40, 40, load, NULL},             [UNLOAD] = {8, 8, unload, NULL},
    [NAMES] = {8, 8, names, NULL},             [WANT] = {8, MOST_SMALL, want, NULL},
    [RUN] = {8, 8, NULL, run},                 [TIME] = {8, 8, NULL, time_runs},
    [PROFILE] = {8, 8, NULL, profile},         [LOOK] = {8, 8, NULL, look},
    [RESET_PEAK] = {0, 0, give_reset, NULL},   [PEAK] = {0, 0, give_peak, NULL},
};

/* The rest of a request with inputs, and what it asks for. 0: what follows cannot be told any more. */
static int answer_with_inputs(state *now, const operation *asked, uint64_t length) {
  if (length < 8 || !take_all(now->with->socket, now->request, 8)) return 0;
  loaded *one = model_of(now);
  if (!one) return 0;
  if (length - 8 != one->given_bytes) return refuse(now, "the inputs have not the size that the network takes"), 0;
  for (int32_t each = 0; each < one->input_count; each++)
    if (!take_all(now->with->socket, one->given[each], one->inputs[each].bytes)) return 0;
  uint64_t runs = number_at(now, 4, 4);
  if (runs > MOST_RUNS) refuse(now, "these are too many runs for one request");
  else asked->with_inputs(now, one, runs);
  return !now->ended;
}

static int answer(state *now) {
  struct { uint32_t operation, zero; uint64_t length; } head;
  if (!take_all(now->with->socket, &head, sizeof head)) return 0;
  const operation *asked = head.operation < OPERATIONS && !head.zero ? &OPERATION[head.operation] : NULL;
  if (!asked || (!asked->small && !asked->with_inputs)) return refuse(now, "there is no such request: is one of us newer?"), 0;
  if (asked->with_inputs) return answer_with_inputs(now, asked, head.length);
  if (head.length < asked->least || head.length > asked->most) return refuse(now, "the request has a length that it cannot have"), 0;
  now->length = head.length;
  if (!take_all(now->with->socket, now->request, (size_t)head.length)) return 0;
  asked->small(now);
  return !now->ended;
}

/* -- the hello ------------------------------------------------------------------------------------------------------- */

static void deadline(int socket, long seconds) {
  struct timeval limit = {seconds, 0};
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
}

static int admit(state *now) {
  const session *with = now->with;
  unsigned char challenge[DIGEST_BYTES], proof[DIGEST_BYTES], expected[DIGEST_BYTES];
  uint32_t hello[3], told[3] = {MAGIC, PROTOCOL, with->token[0] != 0};
  char match[MOST_KEY + 64] = "";
  if (!take_all(with->socket, hello, sizeof hello) || hello[0] != MAGIC || hello[2] >= sizeof match) return 0;
  if (!take_all(with->socket, match, hello[2]) || !random_bytes(challenge, sizeof challenge)) return 0;
  if (!give_all(with->socket, told, sizeof told) || !give_all(with->socket, challenge, sizeof challenge)) return 0;
  if (!take_all(with->socket, proof, sizeof proof)) return 0;
  if (hello[1] != PROTOCOL) return refuse(now, "this dance_server is of another version than its client"), 0;
  hmac_sha256(with->token, challenge, sizeof challenge, expected);
  if (with->token[0] && !same_digest(proof, expected)) {
    sleep(1); /* so that nobody tries many */
    return refuse(now, "it wants its token: set DANCE_TVM_TOKEN to the one that dance_server was started with"), 0;
  }
  if (with->match[0] && strcmp(match, with->match)) return refuse(now, "the tracker has promised it to another client"), 0;
  return 1;
}

/* What the client still sends is read away: closed before that, the connection would lose our last sentence. */
static void part(int socket, void *room) {
  deadline(socket, 1);
  shutdown(socket, SHUT_WR);
  while (recv(socket, room, MOST_SMALL, 0) > 0) continue;
}

void serve(const session *with) {
  static state now;
  now.with = with;
  now.request = malloc(MOST_SMALL);
  deadline(with->socket, HELLO_SECONDS);
  if (now.request && admit(&now)) {
    deadline(with->socket, 0);
    if (write(with->accepted, "!", 1) == 1) reply(&now, DONE, NULL, 0);
    while (!now.ended && answer(&now)) continue;
  }
  if (now.request && !now.ended) part(with->socket, now.request);
  for (int each = 0; each < MOST_MODELS; each++) forget(&now.models[each]);
  free(now.request);
}
