/* What DanceModel.java calls: one artifact in an app, its library in jniLibs and its weights among the assets. */
#include <dance_model.h>

#include <jni.h>
#include <stdlib.h>

typedef struct {
  const dance_api *api;
  dance_model *model;
} opened;

static void throw_sentence(JNIEnv *env, const char *sentence) {
  jclass kind = (*env)->FindClass(env, "java/lang/IllegalStateException");
  if (kind) (*env)->ThrowNew(env, kind, sentence);
}

static opened *of(jlong handle) { return (opened *)(intptr_t)handle; }

JNIEXPORT jlong JNICALL Java_org_dance_DanceModel_create(JNIEnv *env, jclass self, jstring library, jint fd, jlong offset,
                                                         jlong length, jint threads) {
  (void)self;
  char sentence[512] = "";
  const char *path = (*env)->GetStringUTFChars(env, library, NULL);
  if (!path) return 0;
  opened *made = calloc(1, sizeof *made);
  const dance_api *api = dance_model_open(path, sentence, sizeof sentence);
  (*env)->ReleaseStringUTFChars(env, library, path);
  dance_options options = {
      .size = sizeof options, .threads = threads, .weights_fd = fd, .weights_offset = offset, .weights_length = length};
  if (made && api) *made = (opened){api, api->create(&options, sentence, sizeof sentence)};
  if (made && made->model) return (jlong)(intptr_t)made;
  free(made);
  throw_sentence(env, sentence[0] ? sentence : "memory is short");
  return 0;
}

static jobjectArray names(JNIEnv *env, int32_t (*list)(const dance_tensor **)) {
  const dance_tensor *tensors;
  int32_t count = list(&tensors);
  jclass text = (*env)->FindClass(env, "java/lang/String");
  jobjectArray found = text ? (*env)->NewObjectArray(env, count, text, NULL) : NULL;
  for (int32_t each = 0; found && each < count; each++) {
    jstring name = (*env)->NewStringUTF(env, tensors[each].name);
    if (!name) return NULL;
    (*env)->SetObjectArrayElement(env, found, each, name);
    (*env)->DeleteLocalRef(env, name);
  }
  return found;
}

static jlongArray sizes(JNIEnv *env, int32_t (*list)(const dance_tensor **)) {
  const dance_tensor *tensors;
  int32_t count = list(&tensors);
  jlongArray found = (*env)->NewLongArray(env, count);
  for (int32_t each = 0; found && each < count; each++) {
    jlong bytes = (jlong)tensors[each].bytes;
    (*env)->SetLongArrayRegion(env, found, each, 1, &bytes);
  }
  return found;
}

JNIEXPORT jobjectArray JNICALL Java_org_dance_DanceModel_names(JNIEnv *env, jclass self, jlong handle, jboolean inputs) {
  (void)self;
  const dance_api *api = of(handle)->api;
  return names(env, inputs ? api->inputs : api->outputs);
}

JNIEXPORT jlongArray JNICALL Java_org_dance_DanceModel_sizes(JNIEnv *env, jclass self, jlong handle, jboolean inputs) {
  (void)self;
  const dance_api *api = of(handle)->api;
  return sizes(env, inputs ? api->inputs : api->outputs);
}

/* Addresses of direct buffers, each of at least the tensor's bytes; NULL (and an exception) where one is not. */
static void **addresses(JNIEnv *env, jobjectArray buffers, int32_t (*list)(const dance_tensor **)) {
  const dance_tensor *tensors;
  int32_t count = list(&tensors);
  void **found = calloc((size_t)count + 1, sizeof *found);
  int right = found && (*env)->GetArrayLength(env, buffers) == count;
  for (int32_t each = 0; right && each < count; each++) {
    jobject buffer = (*env)->GetObjectArrayElement(env, buffers, each);
    found[each] = buffer ? (*env)->GetDirectBufferAddress(env, buffer) : NULL;
    right = found[each] && (*env)->GetDirectBufferCapacity(env, buffer) >= (jlong)tensors[each].bytes;
    (*env)->DeleteLocalRef(env, buffer);
  }
  if (right) return found;
  free(found);
  throw_sentence(env, "give one direct ByteBuffer for each tensor, of at least its bytes");
  return NULL;
}

JNIEXPORT void JNICALL Java_org_dance_DanceModel_run(JNIEnv *env, jclass self, jlong handle, jobjectArray inputs,
                                                     jobjectArray outputs) {
  (void)self;
  opened *at = of(handle);
  void **given = addresses(env, inputs, at->api->inputs);
  void **answers = given ? addresses(env, outputs, at->api->outputs) : NULL;
  if (answers && at->api->run(at->model, (const void *const *)given, answers) != DANCE_OK)
    throw_sentence(env, at->api->error(at->model));
  free(given);
  free(answers);
}

JNIEXPORT void JNICALL Java_org_dance_DanceModel_cancel(JNIEnv *env, jclass self, jlong handle) {
  (void)env, (void)self;
  of(handle)->api->cancel(of(handle)->model);
}

JNIEXPORT void JNICALL Java_org_dance_DanceModel_destroy(JNIEnv *env, jclass self, jlong handle) {
  (void)env, (void)self;
  if (!handle) return;
  of(handle)->api->destroy(of(handle)->model);
  free(of(handle));
}
