package org.dance;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;

/**
 * One model of an artifact in an app; close it when done. A model runs one call at a time.
 *
 * <pre>
 * AssetFileDescriptor weights = assets.openFd("weights.safetensors"); // stored uncompressed; absent for small networks
 * try (DanceModel model = new DanceModel("libdance_network.so", weights.getParcelFileDescriptor().getFd(),
 *     weights.getStartOffset(), weights.getLength(), 4)) {
 *   ByteBuffer[] outputs = model.outputs();
 *   model.run(inputs, outputs);
 * }
 * </pre>
 */
public final class DanceModel implements AutoCloseable {
  static {
    System.loadLibrary("dance_jni");
  }

  private long handle;

  /** The model of a library that holds its weights, on so many threads (0: as it was built for). */
  public DanceModel(String library, int threads) {
    this(library, -1, 0, 0, threads);
  }

  /**
   * The model of a library whose weights lie in a file.
   *
   * @throws IllegalStateException with a sentence where the library or its weights do not fit
   */
  public DanceModel(String library, int weightsFd, long weightsOffset, long weightsLength, int threads) {
    handle = create(library, weightsFd, weightsOffset, weightsLength, threads);
  }

  public String[] inputNames() {
    return names(open(), true);
  }

  public String[] outputNames() {
    return names(open(), false);
  }

  /** New buffers of the inputs' sizes, in the order of inputNames. */
  public ByteBuffer[] inputs() {
    return buffers(sizes(open(), true));
  }

  /** New buffers of the outputs' sizes, in the order of outputNames. */
  public ByteBuffer[] outputs() {
    return buffers(sizes(open(), false));
  }

  /** One call: direct buffers in the machine's byte order, as inputs() and outputs() make them. */
  public void run(ByteBuffer[] inputs, ByteBuffer[] outputs) {
    run(open(), inputs, outputs);
  }

  /** From another thread: the call under way ends soon, with an IllegalStateException there. */
  public void cancel() {
    cancel(open());
  }

  @Override
  public void close() {
    destroy(handle);
    handle = 0;
  }

  private long open() {
    if (handle == 0) {
      throw new IllegalStateException("this model is closed");
    }
    return handle;
  }

  private static ByteBuffer[] buffers(long[] sizes) {
    ByteBuffer[] made = new ByteBuffer[sizes.length];
    for (int each = 0; each < sizes.length; each++) {
      made[each] = ByteBuffer.allocateDirect(Math.toIntExact(sizes[each])).order(ByteOrder.nativeOrder());
    }
    return made;
  }

  private static native long create(String library, int fd, long offset, long length, int threads);

  private static native String[] names(long handle, boolean inputs);

  private static native long[] sizes(long handle, boolean inputs);

  private static native void run(long handle, ByteBuffer[] inputs, ByteBuffer[] outputs);

  private static native void cancel(long handle);

  private static native void destroy(long handle);
}
