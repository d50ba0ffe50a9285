#include "gpu_driver.h"

#include <dlfcn.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "gpu_inflate.h"
#include "gpu_launch.h"

#if __has_include("gpu_kernels.inc")
namespace molae_gpu {
#include "gpu_kernels.inc"
}
asm(".section .rodata\n.balign 64\nmolae_gpu_blob:\n.incbin \"" MOLAE_GPU_BLOB "\"\n.byte 0\n.previous\n");
extern "C" __attribute__((visibility("hidden"))) const unsigned char molae_gpu_blob[];
#define MOLAE_GPU_HAS_KERNELS 1
#else
#define MOLAE_GPU_HAS_KERNELS 0
#endif

namespace molae_gpu {
namespace {

constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;  // CUdevice_attribute
constexpr int kMaxDynamicShared = 8;                            // CUfunction_attribute
constexpr int kSharedByDefault = 48 * 1024;

struct Driver {
  int (*context)(void**) = nullptr;
  int (*device)(int*) = nullptr;
  int (*attribute)(int*, int, int) = nullptr;
  int (*load)(void**, const void*) = nullptr;
  int (*find)(void**, void*, const char*) = nullptr;
  int (*configure)(void*, int, int) = nullptr;
  int (*start)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) = nullptr;
  int (*fill)(uintptr_t, unsigned char, size_t, void*) = nullptr;
  bool complete = false;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return;
    complete = symbol(library, "cuCtxGetCurrent", &context) && symbol(library, "cuCtxGetDevice", &device) &&
               symbol(library, "cuDeviceGetAttribute", &attribute) && symbol(library, "cuModuleLoadData", &load) &&
               symbol(library, "cuModuleGetFunction", &find) && symbol(library, "cuFuncSetAttribute", &configure) &&
               symbol(library, "cuLaunchKernel", &start) && symbol(library, "cuMemsetD8Async", &fill);
  }

  template <class F>
  static bool symbol(void* library, const char* name, F* function) {
    *reinterpret_cast<void**>(function) = dlsym(library, name);
    return *function != nullptr;
  }
};

const Driver& driver() {
  static const Driver opened;
  return opened;
}

#if MOLAE_GPU_HAS_KERNELS

int capability(int* major, int* minor) {
  const Driver& cuda = driver();
  int device = 0;
  if (int status = cuda.device(&device)) return status;
  if (int status = cuda.attribute(major, kMajor, device)) return status;
  return cuda.attribute(minor, kMinor, device);
}

struct Function {
  void* handle = nullptr;
  const Image* image = nullptr;
};

const Image* find_image(const char* name, int architecture) {
  for (const Image& image : kImages)
    if (image.architecture == architecture && !std::strcmp(image.name, name)) return &image;
  return nullptr;
}

int load(const Image& image, Function* function) {
  const Driver& cuda = driver();
  std::unique_ptr<unsigned char[]> code(new unsigned char[image.size + 1]);
  if (!Inflate(molae_gpu_blob + image.offset, image.packed, code.get(), image.size).run()) return MOLAE_GPU_NO_KERNELS;
  code[image.size] = 0;  // PTX is a string
  void* module = nullptr;
  if (int status = cuda.load(&module, code.get())) return status;
  if (int status = cuda.find(&function->handle, module, image.entry)) return status;
  if (image.shared > kSharedByDefault)
    if (int status = cuda.configure(function->handle, kMaxDynamicShared, image.shared)) return status;
  function->image = &image;
  return MOLAE_GPU_OK;
}

// Machine code for the device, or PTX where there is none or the driver refuses it: code of sm_90a and later runs on exactly
// one architecture, and 12.1 is not 12.0.
int load_for_device(const char* name, Function* function) {
  int major = 0, minor = 0;
  if (int status = capability(&major, &minor)) return status;
  int exact = major == 8 ? 80 : major == 9 ? 90 : major == 10 && minor == 0 ? 100 : major == 12 ? 120 : -1;
  const Image* native = find_image(name, exact);
  if (native && load(*native, function) == MOLAE_GPU_OK) return MOLAE_GPU_OK;
  const Image* text = major >= 8 ? find_image(name, 0) : nullptr;
  return text ? load(*text, function) : MOLAE_GPU_NO_KERNELS;
}

int function_of(const char* name, Function* function) {
  // A module belongs to a context; functions are kept for the life of the process, as the runtime keeps its own.
  static std::mutex guard;
  static std::map<std::pair<void*, std::string>, Function> loaded;
  void* context = nullptr;
  if (int status = driver().context(&context)) return status;
  std::lock_guard<std::mutex> lock(guard);
  Function& kept = loaded[{context, name}];
  if (!kept.handle) {
    Function fresh;
    if (int status = load_for_device(name, &fresh)) return status;
    kept = fresh;
  }
  *function = kept;
  return MOLAE_GPU_OK;
}

constexpr Constants kConstants = {FEW_TOKENS,  SORT_BLOCK,    SCAN_CHUNK,
                                  COLUMNS_BLOCK, COMBINE_BLOCK, FEW_COLUMNS,
                                  FEW_COLUMNS_TRANSPOSED, MAX_GROUPS, MAX_RANK,
                                  kTiles,      static_cast<int>(sizeof(kTiles) / sizeof(kTiles[0]))};

#endif

}  // namespace

void Arguments::number(float value) {
  uint32_t raw;
  std::memcpy(&raw, &value, sizeof raw);
  add(raw);
}

void Arguments::add(uint64_t value) {
  if (count_ < kMost - 2) values_[count_++] = value;
}

void** Arguments::packed() {
  for (int i = 0; i < kMost; ++i) pointers_[i] = &values_[i];
  values_[count_] = values_[count_ + 1] = 0;
  return pointers_;
}

#if MOLAE_GPU_HAS_KERNELS

const Constants* constants() { return &kConstants; }

bool has_variant(const char* name) {
  for (const Image& image : kImages)
    if (!std::strcmp(image.name, name)) return true;
  return false;
}

int launch(const char* name, unsigned grid_x, unsigned grid_y, Arguments& arguments, void* stream) {
  if (!driver().complete) return MOLAE_GPU_NO_DRIVER;
  Function function;
  if (int status = function_of(name, &function)) return status;
  const Image& image = *function.image;
  if (image.arguments != arguments.count()) return MOLAE_GPU_NO_KERNELS;
  return driver().start(function.handle, grid_x, grid_y, 1, 32u * static_cast<unsigned>(image.warps), 1, 1,
                        static_cast<unsigned>(image.shared), stream, arguments.packed(), nullptr);
}

#else

const Constants* constants() { return nullptr; }
bool has_variant(const char*) { return false; }
int launch(const char*, unsigned, unsigned, Arguments&, void*) { return MOLAE_GPU_NO_KERNELS; }

#endif

int multiprocessors(int* count) {
  if (!driver().complete) return MOLAE_GPU_NO_DRIVER;
  int device = 0;
  if (int status = driver().device(&device)) return status;
  return driver().attribute(count, kMultiprocessors, device);
}

int clear(void* data, size_t bytes, void* stream) {
  if (!bytes) return MOLAE_GPU_OK;
  if (!driver().complete) return MOLAE_GPU_NO_DRIVER;
  return driver().fill(reinterpret_cast<uintptr_t>(data), 0, bytes, stream);
}

}  // namespace molae_gpu
