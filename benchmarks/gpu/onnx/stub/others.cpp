// cuBLAS, cuDNN and the driver without a GPU: every call succeeds and nothing is computed.
#define X extern "C"
static char token[4096]; static int used;
static void* handle() { return token + (used = (used + 8) % 4000) + 8; }
X const char* cublasGetStatusName(int) { return "stub"; }
X const char* cublasGetStatusString(int) { return "stub"; }
X int cublasGetMathMode(void*, int* m) { *m = 0; return 0; }
X int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* n) { *n = 1; return 0; }
X const char* cudnnGetErrorString(int) { return "stub"; }
X unsigned long cudnnGetVersion() { return 91900; }
X unsigned long cudnnGetCudartVersion() { return 13000; }
