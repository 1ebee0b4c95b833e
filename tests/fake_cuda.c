/* A libcuda that notes each call and its arguments, and does nothing. It exports the names that Cuda may use, no other. */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define CONTEXT 0x700000001000
#define STREAM 0x700000002000
#define EVENT 0x700000003000

extern int PyGILState_Check(void) __attribute__((weak));

int fake_active = 1, fake_status = 0, fake_mode = 0, fake_pointer = 0, fake_depth = 0;

static char text[1 << 16];
static size_t used;
static char failing[64];
static int failure;
static void *contexts[16];

const char *fake_log(void) { return text; }

void fake_clear(void) { text[used = 0] = 0; }

/* The next call of this function fails. */
void fake_fail(const char *name, int code) {
    strncpy(failing, name, sizeof failing - 1);
    failure = code;
}

static int outcome(const char *name, int needs_context) {
    if (!strcmp(name, failing)) {
        failing[0] = 0;
        return failure;
    }
    return needs_context && !fake_depth ? 201 : 0;
}

#define CALL(needs_context, format, ...)                                                                             \
    do {                                                                                                             \
        const char *lock = PyGILState_Check && PyGILState_Check() ? "locked " : "";                                  \
        used += snprintf(text + used, sizeof text - used, "%s%s(" format ")\n", lock, __func__, __VA_ARGS__);        \
        int code = outcome(__func__, needs_context);                                                                 \
        if (code)                                                                                                    \
            return code;                                                                                             \
    } while (0)

int cuInit(unsigned flags) { CALL(0, "%u", flags); return 0; }

int cuDriverGetVersion(int *version) { CALL(0, "%s", ""); *version = 12040; return 0; }

int cuGetErrorName(int code, const char **name) {
    *name = code == 999 ? NULL : "CUDA_ERROR_FAKE";
    return code == 999;
}

int cuGetErrorString(int code, const char **said) {
    *said = code == 999 ? NULL : "as the test asked";
    return code == 999;
}

int cuDeviceGetCount(int *count) { CALL(0, "%s", ""); *count = 3; return 0; }

int cuDeviceGet(int *device, int number) { CALL(0, "%d", number); *device = number + 40; return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALL(0, "%d, %d", attribute, device);
    *value = attribute + 100;
    return 0;
}

int cuDeviceCanAccessPeer(int *can, int device, int other) {
    CALL(0, "%d, %d", device, other);
    *can = device < other;
    return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    CALL(0, "%d", device);
    *flags = 0;
    *active = fake_active;
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    CALL(0, "%d", device);
    *context = (void *)(CONTEXT + device);
    return 0;
}

int cuCtxPushCurrent_v2(void *context) {
    CALL(0, "%p", context);
    contexts[fake_depth++] = context;
    return 0;
}

int cuCtxPopCurrent_v2(void **context) {
    CALL(1, "%s", "");
    *context = contexts[--fake_depth];
    return 0;
}

int cuThreadExchangeStreamCaptureMode(int *mode) {
    CALL(0, "%d", *mode);
    int before = fake_mode;
    fake_mode = *mode;
    *mode = before;
    return 0;
}

int cuStreamCreate(void **stream, unsigned flags) { CALL(1, "%u", flags); *stream = (void *)STREAM; return 0; }

int cuStreamDestroy_v2(void *stream) { CALL(1, "%p", stream); return 0; }

int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    CALL(1, "%p, %p, %u", stream, event, flags);
    return 0;
}

int cuStreamQuery(void *stream) { CALL(1, "%p", stream); return 0; }

int cuStreamIsCapturing(void *stream, int *status) { CALL(1, "%p", stream); *status = fake_status; return 0; }

int cuEventCreate(void **event, unsigned flags) { CALL(1, "%u", flags); *event = (void *)EVENT; return 0; }

int cuEventRecord(void *event, void *stream) { CALL(1, "%p, %p", event, stream); return 0; }

int cuEventQuery(void *event) { CALL(1, "%p", event); return 0; }

int cuEventSynchronize(void *event) { CALL(1, "%p", event); return 0; }

int cuEventDestroy_v2(void *event) { CALL(1, "%p", event); return 0; }

int cuMemcpyDtoHAsync_v2(void *host, uint64_t device, size_t nbytes, void *stream) {
    CALL(1, "%p, 0x%lx, %zu, %p", host, device, nbytes, stream);
    return 0;
}

int cuMemcpyHtoDAsync_v2(uint64_t device, const void *host, size_t nbytes, void *stream) {
    CALL(1, "0x%lx, %p, %zu, %p", device, host, nbytes, stream);
    return 0;
}

typedef struct {
    size_t x, y;
    unsigned kind;
    void *host;
    uint64_t device;
    void *array;
    size_t pitch;
} side;

typedef struct {
    side from, to;
    size_t row, rows;
} rectangle;

int cuMemcpy2DAsync_v2(const rectangle *copy, void *stream) {
    const side *from = &copy->from, *to = &copy->to;
    CALL(1, "%u %p %zu to %u 0x%lx %zu: %zu x %zu%s, %p", from->kind, from->host, from->pitch, to->kind, to->device,
         to->pitch, copy->row, copy->rows,
         from->x || from->y || from->device || from->array || to->x || to->y || to->host || to->array ? "?" : "",
         stream);
    return 0;
}

int cuMemAlloc_v2(uint64_t *device, size_t nbytes) { CALL(1, "%zu", nbytes); *device = 0xdeadbeef00005678; return 0; }

int cuMemHostRegister_v2(void *host, size_t nbytes, unsigned flags) {
    CALL(1, "%p, %zu, %u", host, nbytes, flags);
    return 0;
}

int cuMemHostUnregister(void *host) { CALL(1, "%p", host); return 0; }

int cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
    CALL(0, "%d, 0x%lx", attribute, address);
    *(int *)value = fake_pointer;
    return 0;
}
