// CUDA's runtime without a GPU: every call succeeds, device memory is the host's, nothing is computed.
#include <cstdlib>
#include <cstring>
#define X extern "C"
static int capturing, used; static char token[4096];
static void* handle() { return token + (used = (used + 8) % 4000) + 8; }
static int give(void** p, size_t n) { if (posix_memalign(p, 256, n ? n : 256)) return 2; memset(*p, 0, n); return 0; }
static void i4(char* p, int at, int v) { memcpy(p + at, &v, 4); }
static void i8(char* p, int at, size_t v) { memcpy(p + at, &v, 8); }
X int cudaGetDeviceCount(int* n) { *n = 1; return 0; }
X int cudaGetDevice(int* n) { *n = 0; return 0; }
X int cudaGetDeviceProperties(char* p, int) {  /* cudaDeviceProp of CUDA 13 */
  memset(p, 0, 1008); strcpy(p, "stub"); i8(p, 288, 80ull << 30); i8(p, 296, 49152); i4(p, 304, 65536); i4(p, 308, 32); i4(p, 320, 1024);
  for (int i = 0; i < 3; i++) { i4(p, 324 + 4 * i, 1024); i4(p, 336 + 4 * i, 65535); } i4(p, 336, 2147483647);
  i4(p, 360, 9); i4(p, 364, 0); i4(p, 384, 132); i4(p, 560, 1); i4(p, 588, 1); i4(p, 596, 50 << 20); i4(p, 604, 2048); i8(p, 624, 233472); i4(p, 632, 65536); i8(p, 672, 232448); return 0; }
X int cudaDeviceGetAttribute(int* v, int a, int) {
  switch (a) { case 75: *v = 9; break; case 76: *v = 0; break; case 16: *v = 132; break; case 97: *v = 232448; break; case 8: *v = 49152; break;
    case 81: *v = 233472; break; case 10: *v = 32; break; case 39: *v = 2048; break; case 38: *v = 50 << 20; break; default: *v = 1024; } return 0; }
X int cudaDriverGetVersion(int* v) { *v = 13000; return 0; }
X int cudaRuntimeGetVersion(int* v) { *v = 13000; return 0; }
X int cudaMemGetInfo(size_t* f, size_t* t) { *f = *t = 80ull << 30; return 0; }
X int cudaMalloc(void** p, size_t n) { return give(p, n); }
X int cudaMallocHost(void** p, size_t n) { return give(p, n); }
X int cudaHostAlloc(void** p, size_t n, unsigned) { return give(p, n); }
X int cudaMallocFromPoolAsync(void** p, size_t n, void*, void*) { return give(p, n); }
X int cudaFree(void* p) { free(p); return 0; }
X int cudaFreeHost(void* p) { free(p); return 0; }
X int cudaFreeAsync(void* p, void*) { free(p); return 0; }
X int cudaMemcpy(void* d, const void* s, size_t n, int) { memcpy(d, s, n); return 0; }
X int cudaMemcpyAsync(void* d, const void* s, size_t n, int, void*) { memcpy(d, s, n); return 0; }
X int cudaMemset(void* d, int v, size_t n) { memset(d, v, n); return 0; }
X int cudaMemsetAsync(void* d, int v, size_t n, void*) { memset(d, v, n); return 0; }
X int cudaMemcpyFromSymbol(void* d, const void*, size_t n, size_t, int) { memset(d, 0, n); return 0; }
X int cudaStreamCreate(void** s) { *s = handle(); return 0; }
X int cudaStreamCreateWithFlags(void** s, unsigned) { *s = handle(); return 0; }
X int cudaEventCreate(void** s) { *s = handle(); return 0; }
X int cudaEventCreateWithFlags(void** s, unsigned) { *s = handle(); return 0; }
X int cudaEventElapsedTime(float* t, void*, void*) { *t = 0.1f; return 0; }
X int cudaStreamBeginCapture(void*, int) { capturing = 1; return 0; }
X int cudaStreamEndCapture(void*, void** g) { capturing = 0; *g = handle(); return 0; }
X int cudaStreamIsCapturing(void*, int* s) { *s = capturing; return 0; }
X int cudaGraphInstantiate(void** e, void*, unsigned long long) { *e = handle(); return 0; }
X int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 1; return 0; }
X int cudaFuncGetAttributes(char* a, const void*) { memset(a, 0, 144); i4(a, 24, 1024); i4(a, 28, 64); i4(a, 32, 90); i4(a, 36, 90); return 0; }
X int cudaPointerGetAttributes(char* a, const void* p) { memset(a, 0, 88); i4(a, 0, 2); i8(a, 8, (size_t)p); return 0; }
X const char* cudaGetErrorName(int) { return "stub"; }
X const char* cudaGetErrorString(int) { return "stub"; }
static int fine() { return 0; }
X int cudaGetDriverEntryPointByVersion(const char*, void** p, unsigned, unsigned long long, int* q) { *p = (void*)fine; if (q) *q = 0; return 0; }
X int cudaMemPoolCreate(void** p, const void*) { *p = handle(); return 0; }
X void** __cudaRegisterFatBinary(void*) { return (void**)token; }
X int cudaLibraryLoadData(void** l, ...) { *l = handle(); return 0; }
X int cudaLibraryGetKernel(void** l, ...) { *l = handle(); return 0; }
X int __cudaGetKernel(void** k, const void*) { *k = handle(); return 0; }
