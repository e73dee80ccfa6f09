// A CUDA driver that does nothing, well: enough of one for Triton to load and "launch" kernels on a machine without a GPU,
// so that tests can count launches and see their arguments. Every call succeeds; kernels don't run.
#include <stdint.h>
#include <string.h>

#define API __attribute__((visibility("default")))
typedef int CUresult;

API int fake_launches = 0;
API unsigned fake_grid[3] = {0, 0, 0};

typedef struct {
  unsigned gridDimX, gridDimY, gridDimZ;
} Grid;

API CUresult cuInit(unsigned flags) { return 0; }
API CUresult cuDriverGetVersion(int* version) { return *version = 13000, 0; }
API CUresult cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
API CUresult cuDeviceGetAttribute(int* value, int attribute, int device) { return *value = 1 << 18, 0; }
API CUresult cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, 0; }
API CUresult cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
API CUresult cuCtxSetCurrent(void* context) { return 0; }
API CUresult cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
API CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
API CUresult cuModuleLoadData(void** module, const void* image) { return *module = (void*)2, 0; }
API CUresult cuModuleGetFunction(void** function, void* module, const char* name) { return *function = (void*)3, 0; }
API CUresult cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = attribute == 0 ? 1024 : 0, 0; }
API CUresult cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
API CUresult cuFuncSetCacheConfig(void* function, int config) { return 0; }
API CUresult cuGetErrorString(int error, const char** text) { return *text = "fake", 0; }
API CUresult cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) { return *clusters = 1, 0; }
API CUresult cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) { return memcpy(data, &pointer, 8), 0; }
API CUresult cuPointerGetAttributes(unsigned count, int* attributes, void** data, uint64_t pointer) {
  return memcpy(data[0], &pointer, 8), 0;
}
API CUresult cuLaunchKernelEx(const Grid* config, void* function, void** parameters, void** extra) {
  ++fake_launches;
  fake_grid[0] = config->gridDimX, fake_grid[1] = config->gridDimY, fake_grid[2] = config->gridDimZ;
  return 0;
}
