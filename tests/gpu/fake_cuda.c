/* A CUDA driver without a device: says it has one, and writes down what it is asked to launch.

   A loaded image is text behind its first four bytes: "NAME ARCHITECTURE ARGUMENTS". */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_ARGUMENTS = 40, MOST_LAUNCHES = 64, MOST_CLEARED = 8 };

struct Function {
  char name[64], entry[64];
  int architecture, arguments, shared;
};

struct Launch {
  struct Function function;
  uint32_t grid[3], block[3], shared;
  uint64_t stream, arguments[MOST_ARGUMENTS];
};

struct Cleared {
  uint64_t start, size, stream;
  int launched; /* before it */
};

static struct {
  int major, minor, multiprocessors, refused, fails;
  uintptr_t context;
} device;
static struct Launch launches[MOST_LAUNCHES];
static struct Cleared cleared[MOST_CLEARED];
static int launched, loaded, clearings;

/* `refused`: architecture whose images do not load; `fails`: status of every launch. A new context each time. */
void fake_reset(int major, int minor, int multiprocessors, int refused, int fails) {
  device.major = major;
  device.minor = minor;
  device.multiprocessors = multiprocessors;
  device.refused = refused;
  device.fails = fails;
  ++device.context;
  launched = loaded = clearings = 0;
}
int fake_launched(void) { return launched; }
int fake_loaded(void) { return loaded; }
const struct Launch* fake_launch(int number) { return &launches[number]; }
int fake_clearings(void) { return clearings; }
const struct Cleared* fake_cleared(int number) { return &cleared[number]; }

int cuCtxGetCurrent(void** context) {
  *context = (void*)device.context;
  return 0;
}
int cuCtxGetDevice(int* number) {
  *number = 0;
  return device.major ? 0 : 201; /* CUDA_ERROR_INVALID_CONTEXT */
}
int cuDeviceGetAttribute(int* value, int attribute, int number) {
  (void)number;
  *value = attribute == 75 ? device.major : attribute == 76 ? device.minor : attribute == 16 ? device.multiprocessors : -1;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  struct Function* made = calloc(1, sizeof *made);
  if (sscanf((const char*)image + 4, "%63s %d %d", made->name, &made->architecture, &made->arguments) != 3) return 200;
  if (made->architecture == device.refused) return 209; /* CUDA_ERROR_NO_BINARY_FOR_GPU */
  ++loaded;
  *module = made;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  strncpy(((struct Function*)module)->entry, name, 63);
  *function = module;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return 1;
  ((struct Function*)function)->shared = value;
  return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** arguments, void** extra) {
  if (device.fails) return device.fails;
  if (launched == MOST_LAUNCHES || extra) return 1;
  struct Launch* launch = &launches[launched++];
  launch->function = *(struct Function*)function;
  uint32_t sizes[] = {gx, gy, gz, bx, by, bz};
  memcpy(launch->grid, sizes, sizeof sizes);
  launch->shared = shared;
  launch->stream = (uintptr_t)stream;
  for (int i = 0; i < launch->function.arguments + 2; ++i) launch->arguments[i] = *(uint64_t*)arguments[i];
  return 0;
}
/* Written down, not done. */
int cuMemsetD8Async(uint64_t start, unsigned char value, size_t size, void* stream) {
  if (device.fails) return device.fails;
  if (clearings == MOST_CLEARED || value) return 1;
  struct Cleared made = {start, size, (uintptr_t)stream, launched};
  cleared[clearings++] = made;
  return 0;
}
