/* Uploaded files by SHA-256, one that was cut off as `<sha>.part`; and the artifacts that they make up. */
#include "server.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#define MOST_MANIFEST ((int64_t)64 << 20)

#if defined(__aarch64__)
#define ELF_MACHINE 183
#elif defined(__x86_64__)
#define ELF_MACHINE 62
#endif

static int refuse(char *error, const char *sentence) {
  snprintf(error, SENTENCE_BYTES, "%s", sentence);
  return 0;
}

/* `stat` by its number: glibc has no such function before 2.33. */
static int look_up(const char *path, struct stat *about) { return (int)syscall(SYS_newfstatat, AT_FDCWD, path, about, 0); }

int open_store(store *files, const char *folder, char *error) {
  struct stat about;
  if (strlen(folder) >= sizeof files->folder) return refuse(error, "the path of the store is too long");
  snprintf(files->folder, sizeof files->folder, "%s", folder);
  mkdir(folder, 0700);
  if (look_up(folder, &about) || !S_ISDIR(about.st_mode)) return refuse(error, "the store cannot be made: give --store another folder");
  if (about.st_uid != geteuid() || about.st_mode & (S_IWGRP | S_IWOTH))
    return refuse(error, "others may write to the store: what lies in it is loaded as a program, so give --store another folder");
  return 1;
}

void store_path(const store *files, const unsigned char digest[DIGEST_BYTES], const char *end, char path[PATH_BYTES]) {
  char name[HEX_BYTES];
  hex_of(digest, name);
  snprintf(path, PATH_BYTES, "%s/%s%s", files->folder, name, end);
}

static int64_t size_of(const char *path) {
  struct stat about;
  return look_up(path, &about) ? -1 : (int64_t)about.st_size;
}

int64_t store_has(const store *files, const unsigned char digest[DIGEST_BYTES], uint64_t total) {
  char path[PATH_BYTES];
  store_path(files, digest, "", path);
  if (size_of(path) == (int64_t)total) {
    utimensat(AT_FDCWD, path, NULL, 0); /* used now: others go first */
    return -1;
  }
  store_path(files, digest, ".part", path);
  int64_t size = size_of(path);
  return size < 0 ? 0 : size;
}

int store_append(const store *files, const unsigned char digest[DIGEST_BYTES], uint64_t offset, const void *data, size_t bytes,
                 char *error) {
  char path[PATH_BYTES];
  store_path(files, digest, ".part", path);
  if (offset > files->limit || bytes > files->limit - offset) return refuse(error, "the file is larger than the store may be");
  if (offset && size_of(path) < (int64_t)offset) return refuse(error, "the file has not come so far: begin where it ends");
  int file = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0) return refuse(error, "the store cannot be written to");
  ssize_t written = pwrite(file, data, bytes, (off_t)offset);
  int kept = written == (ssize_t)bytes;
  int cut = ftruncate(file, (off_t)(kept ? offset + bytes : offset));
  close(file);
  return kept && !cut ? 1 : refuse(error, "No space left for the file");
}

/* The oldest of the store's files, and what all take. */
static uint64_t look_through(const store *files, const char *keep, char oldest[PATH_BYTES]) {
  uint64_t all = 0;
  int64_t first = INT64_MAX;
  struct dirent *entry;
  DIR *folder = opendir(files->folder);
  oldest[0] = 0;
  while (folder && (entry = readdir(folder))) {
    char path[PATH_BYTES];
    struct stat about;
    snprintf(path, sizeof path, "%s/%.80s", files->folder, entry->d_name);
    if (look_up(path, &about) || !S_ISREG(about.st_mode)) continue;
    all += (uint64_t)about.st_size;
    if ((int64_t)about.st_mtime >= first || !strcmp(path, keep)) continue;
    first = (int64_t)about.st_mtime;
    memcpy(oldest, path, sizeof path);
  }
  if (folder) closedir(folder);
  return all;
}

int store_finish(const store *files, const unsigned char digest[DIGEST_BYTES], char *error) {
  char part[PATH_BYTES], whole[PATH_BYTES], oldest[PATH_BYTES];
  unsigned char found[DIGEST_BYTES];
  store_path(files, digest, ".part", part);
  store_path(files, digest, "", whole);
  if (!sha256_file(part, found)) return refuse(error, "no such file was uploaded");
  if (!same_digest(found, digest)) {
    unlink(part);
    return refuse(error, "the uploaded file arrived damaged");
  }
  if (rename(part, whole)) return refuse(error, "the store cannot be written to");
  while (look_through(files, whole, oldest) > files->limit && oldest[0] && !unlink(oldest)) continue;
  return 1;
}

uint64_t store_free(const store *files) {
  struct statfs about;
  return statfs(files->folder, &about) ? 0 : (uint64_t)about.f_bavail * (uint64_t)about.f_bsize;
}

/* -- manifests: JSON in the one form that builds write, so that a field is found by its line ------------------------- */

typedef struct {
  const char *begin, *end;
} span;

/* What follows `mark` in `within`; begin NULL where it is not there. */
static span after(span within, const char *mark) {
  const char *at = within.begin ? memmem(within.begin, (size_t)(within.end - within.begin), mark, strlen(mark)) : NULL;
  return at ? (span){at + strlen(mark), within.end} : (span){NULL, NULL};
}

static span before(span within, const char *mark) {
  const char *at = within.begin ? memmem(within.begin, (size_t)(within.end - within.begin), mark, strlen(mark)) : NULL;
  return at ? (span){within.begin, at} : (span){NULL, NULL};
}

/* The digest that stands at the beginning of a span, with its closing quote. */
static int digest_at(span within, unsigned char digest[DIGEST_BYTES]) {
  if (!within.begin || within.end - within.begin < 2 * DIGEST_BYTES + 1 || within.begin[2 * DIGEST_BYTES] != '"') return 0;
  for (int each = 0; each < 2 * DIGEST_BYTES; each++) {
    char letter = within.begin[each];
    int value = letter >= '0' && letter <= '9' ? letter - '0' : letter >= 'a' && letter <= 'f' ? letter - 'a' + 10 : -1;
    if (value < 0) return 0;
    digest[each / 2] = (unsigned char)(each % 2 ? digest[each / 2] | value : value << 4);
  }
  return 1;
}

/* The seal is the hash of the manifest in which it is empty. */
static int is_sealed(span manifest) {
  unsigned char expected[DIGEST_BYTES], found[DIGEST_BYTES];
  sha256 hash;
  span seal = after(manifest, "\n \"seal\": \"");
  if (!digest_at(seal, expected)) return 0;
  sha256_begin(&hash);
  sha256_add(&hash, manifest.begin, (size_t)(seal.begin - manifest.begin));
  sha256_add(&hash, seal.begin + 2 * DIGEST_BYTES, (size_t)(manifest.end - seal.begin) - 2 * DIGEST_BYTES);
  sha256_end(&hash, found);
  return same_digest(found, expected);
}

static int digest_of(span manifest, const char *entry, unsigned char digest[DIGEST_BYTES]) {
  span files = before(after(manifest, "\n \"files\": {"), "\n }");
  return digest_at(after(before(after(files, entry), "}"), "\"sha256\": \""), digest);
}

static int is_for_this_machine(const char *library) {
  unsigned char head[20] = {0};
  int file = open(library, O_RDONLY | O_CLOEXEC);
  ssize_t got = file < 0 ? -1 : read(file, head, sizeof head);
  if (file >= 0) close(file);
  return got == (ssize_t)sizeof head && !memcmp(head, "\177ELF\2\1", 6) && head[18] == ELF_MACHINE && !head[19];
}

static int find_files(const store *files, span manifest, sealed *found, char *error) {
  unsigned char library[DIGEST_BYTES], weights[DIGEST_BYTES], now[DIGEST_BYTES];
  if (!is_sealed(manifest)) return refuse(error, "the manifest is damaged: its seal does not fit");
  if (!digest_of(manifest, "\n  \"model.so\": {", library)) return refuse(error, "the manifest names no model.so");
  store_path(files, library, "", found->library);
  if (!sha256_file(found->library, now)) return refuse(error, "the model.so that the manifest names was not uploaded");
  if (!same_digest(now, library)) {
    unlink(found->library);
    return refuse(error, "model.so was damaged on this device: load the artifact again, which uploads it anew");
  }
  if (!is_for_this_machine(found->library)) return refuse(error, "model.so is for another kind of processor");
  found->weights[0] = 0;
  if (digest_of(manifest, "\n  \"weights.safetensors\": {", weights)) store_path(files, weights, "", found->weights);
  return 1;
}

int find_sealed(const store *files, const unsigned char digest[DIGEST_BYTES], sealed *found, char *error) {
  char path[PATH_BYTES];
  store_path(files, digest, "", path);
  int64_t size = size_of(path), used = 0, got = 0;
  if (size <= 0 || size > MOST_MANIFEST) return refuse(error, "the artifact's manifest was not uploaded");
  char *bytes = malloc((size_t)size);
  int file = open(path, O_RDONLY | O_CLOEXEC);
  while (bytes && file >= 0 && used < size && (got = read(file, bytes + used, (size_t)(size - used))) > 0) used += got;
  if (file >= 0) close(file);
  int fits = bytes && used == size ? find_files(files, (span){bytes, bytes + size}, found, error)
                                   : refuse(error, "the manifest cannot be read");
  free(bytes);
  return fits;
}
