/* TVM's tracker (tvm/rpc/tracker.py): messages are a length and JSON. A server offers itself under a match key, which the
 * tracker gives to one client; who comes with it may stay. Its form tells clients that no TVM is here, and the tracker what
 * it forgets when we are gone: all before the last colon is the key. */
#include "server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define TRACKER_MAGIC 0x2f271
#define MOST_ANSWER (1 << 20)
#define ANSWER_SECONDS 10

enum { PUT = 3, UPDATE_INFO = 5, PENDING = 7 };

/* The answer to a message, in memory of the caller's to free; NULL: none came. */
static char *ask(const tracker *with, const text *message) {
  int32_t length = (int32_t)message->used;
  char *answer = NULL;
  if (give_all(with->socket, &length, sizeof length) && give_all(with->socket, message->data, message->used) &&
      take_all(with->socket, &length, sizeof length) && length > 0 && length < MOST_ANSWER && (answer = malloc((size_t)length + 1))) {
    if (take_all(with->socket, answer, (size_t)length)) {
      answer[length] = 0;
      return answer;
    }
  }
  free(answer);
  return NULL;
}

static int is_told(const tracker *with, const text *message) {
  char *answer = ask(with, message);
  int done = answer && atoi(answer) == 0;
  free(answer);
  return done;
}

static void add_own_address(const tracker *with, text *to) {
  if (with->own_address) add_quoted(to, with->own_address);
  else add(to, "null");
}

static int tracker_meet(tracker *with) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)with->port)};
  struct timeval limit = {ANSWER_SECONDS, 0};
  int32_t magic = TRACKER_MAGIC;
  text about = {0};
  if (inet_pton(AF_INET, with->host, &address.sin_addr) != 1) return 0;
  with->socket = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (with->socket < 0) return 0;
  setsockopt(with->socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(with->socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  int met = !connect(with->socket, (struct sockaddr *)&address, sizeof address) && give_all(with->socket, &magic, sizeof magic) &&
            take_all(with->socket, &magic, sizeof magic) && magic == TRACKER_MAGIC;
  add(&about, "[%d, {\"key\": \"server:%s\", \"addr\": [", UPDATE_INFO, with->key);
  add_own_address(with, &about);
  add(&about, ", %d]}]", with->own_port);
  met = met && is_told(with, &about);
  free(about.data);
  return met;
}

int tracker_offer(tracker *with) {
  uint64_t number = 0;
  text offer = {0};
  if (with->socket < 0 && !tracker_meet(with)) {
    tracker_leave(with);
    return 0;
  }
  random_bytes(&number, sizeof number);
  snprintf(with->match, sizeof with->match, "%s:dance-%u-%016llx", with->key, PROTOCOL, (unsigned long long)number);
  add(&offer, "[%d, \"%s\", [%d, \"%s\"], ", PUT, with->key, with->own_port, with->match);
  add_own_address(with, &offer);
  add(&offer, "]");
  int offered = is_told(with, &offer);
  free(offer.data);
  if (!offered) tracker_leave(with);
  return offered;
}

int tracker_still_offers(tracker *with) {
  text question = {0};
  add(&question, "[%d]", PENDING);
  char *answer = ask(with, &question);
  int state = !answer ? -1 : strstr(answer, with->match) != NULL;
  free(question.data);
  free(answer);
  if (state < 0) tracker_leave(with);
  return state;
}

void tracker_leave(tracker *with) {
  if (with->socket >= 0) close(with->socket);
  with->socket = -1;
  with->match[0] = 0;
}
