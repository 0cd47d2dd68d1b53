/* dance_server [--host ADDRESS] [--port PORT] [--store FOLDER] [--store-limit BYTES] [--end-with-stdin]
 *              [--tracker ADDRESS:PORT --key KEY [--custom-addr ADDRESS]]
 *
 * Runs sealed artifacts for one client after the other, each in a process of its own. It binds to 127.0.0.1 unless told
 * otherwise, and then wants the environment's DANCE_TVM_TOKEN. Addresses are numbers (IPv4).
 */
#include "server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define WAITING_CLIENTS 16
#define PING_MS 2000
#define MOST_UNUSED 4 /* pings that a match key may be taken and not come with */
#define GONE 0x2000   /* POLLRDHUP */

typedef struct {
  const char *host, *folder, *token;
  int port, ends_with_input, listening;
  uint64_t limit;
  tracker tracker;
  store files;
} server;

static int fail(const char *sentence) {
  dprintf(2, "dance_server: %s\n", sentence);
  return 2;
}

/* ADDRESS:PORT, cut in two. */
static int read_place(char *word, const char **host, int *port) {
  char *colon = strrchr(word, ':');
  if (!colon) return 0;
  *colon = 0, *host = word, *port = atoi(colon + 1);
  return *port > 0 && *port < 65536;
}

static const char *read_options(server *self, int count, char **words) {
  for (int at = 1; at < count; at++) {
    char *word = words[at], *value = at + 1 < count ? words[at + 1] : NULL;
    if (!strcmp(word, "--end-with-stdin")) {
      self->ends_with_input = 1;
      continue;
    }
    if (!value) return "an option lacks its value, or is not one of --host --port --store --store-limit --tracker --key --custom-addr --end-with-stdin";
    at++;
    if (!strcmp(word, "--host")) self->host = value;
    else if (!strcmp(word, "--port")) self->port = atoi(value);
    else if (!strcmp(word, "--store")) self->folder = value;
    else if (!strcmp(word, "--store-limit")) self->limit = strtoull(value, NULL, 10);
    else if (!strcmp(word, "--key")) self->tracker.key = value;
    else if (!strcmp(word, "--custom-addr")) self->tracker.own_address = value;
    else if (strcmp(word, "--tracker") || !read_place(value, &self->tracker.host, &self->tracker.port))
      return "an option is not one of --host --port --store --store-limit --tracker ADDRESS:PORT --key --custom-addr --end-with-stdin";
  }
  const char *key = self->tracker.key;
  if (self->tracker.host && !key) return "--tracker needs a --key";
  if (key && (!*key || strlen(key) >= MOST_KEY || strspn(key, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != strlen(key)))
    return "--key is made of letters, digits, points and dashes";
  if (strcmp(self->host, "127.0.0.1") && !self->token[0])
    return "others than this device can reach that --host: set DANCE_TVM_TOKEN to a secret that clients must know";
  return NULL;
}

static const char *start_listening(server *self) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)self->port)};
  socklen_t length = sizeof address;
  const int yes = 1;
  if (inet_pton(AF_INET, self->host, &address.sin_addr) != 1) return "--host is an address such as 127.0.0.1";
  self->listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  setsockopt(self->listening, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (bind(self->listening, (struct sockaddr *)&address, sizeof address) || listen(self->listening, WAITING_CLIENTS))
    return "the port is in use, or not ours to take";
  getsockname(self->listening, (struct sockaddr *)&address, &length);
  self->tracker.own_port = ntohs(address.sin_port);
  return NULL;
}

/* A client that is gone without a word is noticed within a minute. */
static void keep_alive(int socket) {
  const int yes = 1, idle = 30, every = 10, times = 3;
  setsockopt(socket, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes);
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPINTVL, &every, sizeof every);
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof times);
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

static void be_session(server *self, int socket, int accepted) {
  session with = {socket, &self->files, self->token, self->tracker.match, accepted};
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  close(self->listening);
  serve(&with);
  _exit(0);
}

static int is_input_closed(void) {
  char piece[256];
  struct pollfd input = {0, POLLIN, 0};
  return poll(&input, 1, 0) > 0 && read(0, piece, sizeof piece) <= 0;
}

/* Until the session's process ends, or its client is gone, in the middle of a run too. Whether the client was let in. */
static int attend(server *self, int socket, int told, pid_t process) {
  int let_in = 0, lasts = 1;
  while (lasts) {
    struct pollfd watched[3] = {{socket, GONE, 0}, {told, POLLIN, 0}, {self->ends_with_input ? 0 : -1, POLLIN, 0}};
    char mark;
    if (poll(watched, 3, -1) < 0) continue;
    if (watched[1].revents) lasts = read(told, &mark, 1) == 1, let_in |= lasts;
    if (watched[0].revents || (watched[2].revents && is_input_closed())) {
      lasts = 0;
      kill(process, SIGKILL);
    }
  }
  close(told);
  close(socket);
  waitpid(process, NULL, 0);
  return let_in;
}

/* Serve one client; whether it was let in. */
static int serve_next(server *self) {
  int socket = accept(self->listening, NULL, NULL), ends[2];
  if (socket < 0) return 0;
  keep_alive(socket);
  pid_t process = pipe(ends) ? -1 : fork();
  if (!process) {
    close(ends[0]);
    be_session(self, socket, ends[1]);
  }
  if (process > 0) {
    close(ends[1]);
    return attend(self, socket, ends[0], process);
  }
  close(socket);
  sleep(1); /* there is no process or pipe left: others may give theirs back */
  return 0;
}

/* Wait for a client; meanwhile the tracker is to know us. 0: no client came within one ping. */
static int is_client_there(server *self, int has_tracker) {
  struct pollfd watched[2] = {{self->listening, POLLIN, 0}, {self->ends_with_input ? 0 : -1, POLLIN, 0}};
  int found = poll(watched, 2, has_tracker ? PING_MS : -1);
  if (found > 0 && watched[1].revents && is_input_closed()) _exit(0);
  return found > 0 && watched[0].revents;
}

static void serve_for_ever(server *self) {
  tracker *with = self->tracker.host ? &self->tracker : NULL;
  int offered = 0, unused = 0;
  for (;;) {
    if (with && !offered) offered = tracker_offer(with), unused = 0;
    if (is_client_there(self, with != NULL)) {
      if (serve_next(self)) offered = 0;
    } else if (with && offered) {
      int still = tracker_still_offers(with);
      unused = still > 0 ? 0 : unused + 1;
      offered = still >= 0 && unused < MOST_UNUSED;
    }
  }
}

int main(int count, char **words) {
  char error[SENTENCE_BYTES];
  const char *token = getenv("DANCE_TVM_TOKEN");
  server self = {.host = "127.0.0.1", .folder = "dance_store", .token = token ? token : "", .limit = (uint64_t)2 << 30,
                 .tracker = {.socket = -1}};
  const char *wrong = read_options(&self, count, words);
  if (wrong) return fail(wrong);
  if (!open_store(&self.files, self.folder, error)) return fail(error);
  self.files.limit = self.limit;
  if ((wrong = start_listening(&self))) return fail(wrong);
  dprintf(1, "dance-tvm device ready on port %d\n", self.tracker.own_port);
  serve_for_ever(&self);
  return 0;
}
