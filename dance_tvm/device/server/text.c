/* Text that grows, and SHA-256. */
#include "server.h"

typedef uint32_t sha256_word;
#include "sha256.h"

#include <fcntl.h>
#include <stdarg.h>
#include <unistd.h>

void add(text *to, const char *format, ...) {
  va_list words;
  for (;;) {
    va_start(words, format);
    int length = vsnprintf(to->data ? to->data + to->used : NULL, to->room - to->used, format, words);
    va_end(words);
    if (length < 0) return;
    if (to->used + (size_t)length < to->room) {
      to->used += (size_t)length;
      return;
    }
    size_t room = 2 * (to->room + (size_t)length + 1);
    char *more = realloc(to->data, room);
    if (!more) return;
    to->data = more, to->room = room;
  }
}

void add_quoted(text *to, const char *what) {
  add(to, "\"");
  for (const unsigned char *each = (const unsigned char *)what; *each; each++) {
    if (*each == '"' || *each == '\\') add(to, "\\%c", *each);
    else if (*each < 0x20 || *each > 0x7e) add(to, "\\u%04x", *each);
    else add(to, "%c", *each);
  }
  add(to, "\"");
}

size_t read_text(const char *path, char *to, size_t room) {
  size_t used = 0;
  int file = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t got = 0;
  while (file >= 0 && used < room - 1 && (got = read(file, to + used, room - 1 - used)) > 0) used += (size_t)got;
  if (file >= 0) close(file);
  while (used && (to[used - 1] == '\n' || to[used - 1] == ' ')) used--;
  to[used] = 0;
  return used;
}

static void compress(uint32_t state[8], const unsigned char *block) {
  uint32_t words[64];
  for (int word = 0; word < 16; word++) {
    memcpy(&words[word], block + 4 * word, 4);
    words[word] = __builtin_bswap32(words[word]);
  }
  sha256_rounds(state, words);
}

void sha256_begin(sha256 *hash) {
  memcpy(hash->state, SHA256_FIRST, sizeof SHA256_FIRST);
  hash->bytes = 0;
}

void sha256_add(sha256 *hash, const void *data, size_t bytes) {
  const unsigned char *from = data;
  while (bytes) {
    size_t inside = (size_t)(hash->bytes % 64), part = 64 - inside < bytes ? 64 - inside : bytes;
    if (part == 64) compress(hash->state, from);
    else {
      memcpy(hash->block + inside, from, part);
      if (inside + part == 64) compress(hash->state, hash->block);
    }
    hash->bytes += part, from += part, bytes -= part;
  }
}

void sha256_end(sha256 *hash, unsigned char digest[DIGEST_BYTES]) {
  static const unsigned char PADDING[64] = {0x80};
  uint64_t bits = __builtin_bswap64(hash->bytes * 8);
  sha256_add(hash, PADDING, 1 + (size_t)((119 - hash->bytes % 64) % 64));
  sha256_add(hash, &bits, sizeof bits);
  for (int word = 0; word < 8; word++) {
    uint32_t turned = __builtin_bswap32(hash->state[word]);
    memcpy(digest + 4 * word, &turned, 4);
  }
}

int sha256_file(const char *path, unsigned char digest[DIGEST_BYTES]) {
  static char piece[1 << 16];
  sha256 hash;
  ssize_t got = -1;
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  sha256_begin(&hash);
  while ((got = read(file, piece, sizeof piece)) > 0) sha256_add(&hash, piece, (size_t)got);
  close(file);
  sha256_end(&hash, digest);
  return got == 0;
}

void hmac_sha256(const char *key, const unsigned char *data, size_t bytes, unsigned char digest[DIGEST_BYTES]) {
  unsigned char inner[64] = {0}, outer[64];
  size_t length = strlen(key);
  sha256 hash;
  sha256_begin(&hash);
  sha256_add(&hash, key, length);
  if (length > sizeof inner) sha256_end(&hash, inner);
  else memcpy(inner, key, length);
  for (size_t each = 0; each < sizeof inner; each++) outer[each] = inner[each] ^ 0x5c, inner[each] ^= 0x36;
  sha256_begin(&hash);
  sha256_add(&hash, inner, sizeof inner);
  sha256_add(&hash, data, bytes);
  sha256_end(&hash, digest);
  sha256_begin(&hash);
  sha256_add(&hash, outer, sizeof outer);
  sha256_add(&hash, digest, DIGEST_BYTES);
  sha256_end(&hash, digest);
}

void hex_of(const unsigned char digest[DIGEST_BYTES], char to[HEX_BYTES]) {
  for (int each = 0; each < DIGEST_BYTES; each++) snprintf(to + 2 * each, 3, "%02x", digest[each]);
}

int same_digest(const unsigned char *one, const unsigned char *other) {
  int differs = 0;
  for (int each = 0; each < DIGEST_BYTES; each++) differs |= one[each] ^ other[each];
  return !differs;
}

int random_bytes(void *to, size_t bytes) {
  int file = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
  ssize_t got = file < 0 ? -1 : read(file, to, bytes);
  if (file >= 0) close(file);
  return got == (ssize_t)bytes;
}
