/* dance_server: artifacts over a network, with no TVM where they run. What its parts know of one another.
 *
 * The protocol, little-endian. A client says hello (magic, version, bytes of the match key that the tracker gave it, the
 * key); the server answers (magic, version, whether it wants a token, a challenge of 32 bytes); the client proves that it
 * has the token (HMAC-SHA256 of the challenge). From there on requests (operation, 0, bytes: 4, 4 and 8, then so many
 * bytes) have replies (status, 0, bytes). Nothing is encrypted.
 *
 * Compiled against plain headers so that one object serves glibc and Android: no errno, no signals, no sysconf, no
 * getaddrinfo, no standard streams, whose numbers and layouts differ between them.
 */
#ifndef DANCE_SERVER_H
#define DANCE_SERVER_H

#include "dance_model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC 0x45434e44u /* "DNCE" */
#define PROTOCOL 1u
#define DIGEST_BYTES 32
#define HEX_BYTES (2 * DIGEST_BYTES + 1)
#define SENTENCE_BYTES 512
#define PATH_BYTES 1024
#define MOST_KEY 128
#define MOST_CHUNK ((uint64_t)1 << 20)
#define MOST_MODELS 64
#define HELLO_SECONDS 10

enum { DONE = 0, REFUSED = 1, PART = 2 }; /* of a reply; parts come before the one that ends it */

enum {
  FACTS = 1,  /* JSON: what this device is */
  SENSORS,    /* JSON: clocks, governors, temperatures, milliwatts */
  PIN,        /* count of CPUs, CPUs: this session's threads stay on them; 0 for all */
  HAVE,       /* SHA-256, bytes of the whole file -> bytes that are here, -1 for all */
  APPEND,     /* SHA-256, offset, data */
  FINISH,     /* SHA-256: the file is whole; refused, and removed, where its hash is another one */
  LOAD,       /* SHA-256 of a manifest, threads or 0 -> number of the model, steps */
  UNLOAD,     /* number */
  NAMES,      /* number -> the kernels of its steps, a line each */
  WANT,       /* number, a 64-bit mask a step: whose tensors' elements LOOK sends */
  RUN,        /* number, 0, inputs -> outputs */
  TIME,       /* number, runs, inputs -> nanoseconds of each */
  PROFILE,    /* number, runs, inputs -> nanoseconds of each step of each run */
  LOOK,       /* number, 0, inputs -> a part for each kernel: count, its name, tensors */
  RESET_PEAK, /* -> 1 where the system lets us */
  PEAK,       /* -> largest resident memory in bytes since then, -1 where unknown */
  OPERATIONS
};

/* -- text.c: text that grows, and SHA-256 --------------------------------------------------------------------------- */

typedef struct {
  char *data;
  size_t used, room;
} text;

void add(text *to, const char *format, ...) __attribute__((format(printf, 2, 3)));
void add_quoted(text *to, const char *what); /* as JSON has strings */
size_t read_text(const char *path, char *to, size_t room); /* without white space at its end; "" where it cannot be read */

typedef struct {
  uint32_t state[8];
  uint64_t bytes;
  unsigned char block[64];
} sha256;

void sha256_begin(sha256 *hash);
void sha256_add(sha256 *hash, const void *data, size_t bytes);
void sha256_end(sha256 *hash, unsigned char digest[DIGEST_BYTES]);
int sha256_file(const char *path, unsigned char digest[DIGEST_BYTES]); /* 0 where it cannot be read */
void hmac_sha256(const char *key, const unsigned char *data, size_t bytes, unsigned char digest[DIGEST_BYTES]);
void hex_of(const unsigned char digest[DIGEST_BYTES], char to[HEX_BYTES]);
int same_digest(const unsigned char *one, const unsigned char *other); /* takes as long wherever they differ */
int random_bytes(void *to, size_t bytes);

/* -- store.c: uploaded files by SHA-256, and artifacts among them --------------------------------------------------- */

typedef struct {
  char folder[PATH_BYTES / 2];
  uint64_t limit; /* bytes that are kept */
} store;

int open_store(store *files, const char *folder, char *error);
void store_path(const store *files, const unsigned char digest[DIGEST_BYTES], const char *end, char path[PATH_BYTES]);
int64_t store_has(const store *files, const unsigned char digest[DIGEST_BYTES], uint64_t total);
int store_append(const store *files, const unsigned char digest[DIGEST_BYTES], uint64_t offset, const void *data, size_t bytes,
                 char *error);
int store_finish(const store *files, const unsigned char digest[DIGEST_BYTES], char *error);
uint64_t store_free(const store *files);

typedef struct {
  char library[PATH_BYTES], weights[PATH_BYTES]; /* no weights: "" */
} sealed;

/* The files of the artifact whose manifest was uploaded: its seal and the library are verified, the weights by `create`. */
int find_sealed(const store *files, const unsigned char manifest[DIGEST_BYTES], sealed *found, char *error);

/* -- sensors.c ------------------------------------------------------------------------------------------------------ */

void tell_facts(const store *files, text *to);
void tell_sensors(text *to);
int reset_peak(void);
int64_t peak_memory(void);

/* -- tracker.c: TVM's tracker, with which servers register -------------------------------------------------------------- */

typedef struct {
  const char *host, *key, *own_address;
  int port, own_port, socket; /* -1: not connected */
  char match[MOST_KEY + 64]; /* what the tracker gives to the client whose turn it is */
} tracker;

int tracker_offer(tracker *with); /* connect where needed and offer this device under a new match key; 0: not reached */
int tracker_still_offers(tracker *with); /* -1: the tracker is gone */
void tracker_leave(tracker *with);

/* -- session.c ------------------------------------------------------------------------------------------------------ */

typedef struct {
  int socket;
  const store *files;
  const char *token; /* "": none is wanted */
  const char *match; /* "": any client */
  int accepted;      /* a descriptor that is told once the client may stay */
} session;

void serve(const session *with); /* until the client ends it */
int take_all(int socket, void *to, size_t bytes);
int give_all(int socket, const void *from, size_t bytes);

#endif
