/* A libnccl that notes each call and its arguments, and does nothing. It exports the names that Nccl uses, no other. */

#include <stdio.h>
#include <string.h>

typedef struct { char internal[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking; } Config;

int fake_version = 22809, fake_state = 0;

static char text[1 << 14];
static size_t used;
static char failing[64];
static int failure;

const char *fake_log(void) { return text; }

void fake_clear(void) { text[used = 0] = 0; }

/* Each call of this function fails from now on; 7 is no failure, but "in progress". */
void fake_fail(const char *name, int code) {
    strncpy(failing, name, sizeof failing - 1);
    failure = code;
}

#define CALL(format, ...)                                                                                              \
    used += snprintf(text + used, sizeof text - used, "%s(" format ")\n", __func__, __VA_ARGS__);                      \
    return strcmp(__func__, failing) ? 0 : failure

int ncclGetVersion(int *version) { *version = fake_version; CALL("%s", ""); }

int ncclGetUniqueId(Id *id) { memset(id->internal, 'x', sizeof id->internal); id->internal[5] = 0; CALL("%s", ""); }

int ncclCommInitRankConfig(void **comm, int size, Id id, int rank, Config *config) {
    *comm = (void *)0x700000001234;
    CALL("%d, %c%d%c, %d, %zu %x %u %d", size, id.internal[0], id.internal[5], id.internal[127], rank, config->size,
         config->magic, config->version, config->blocking);
}

int ncclCommGetAsyncError(void *comm, int *state) { *state = fake_state; CALL("%p", comm); }

int ncclCommAbort(void *comm) { CALL("%p", comm); }

int ncclGroupStart(void) { CALL("%s", ""); }

int ncclGroupEnd(void) { CALL("%s", ""); }

int ncclReduceScatter(void *from, void *to, size_t count, int type, int op, void *comm, void *stream) {
    CALL("%p, %p, %zu, type %d, op %d, %p, %p", from, to, count, type, op, comm, stream);
}

int ncclAllGather(void *from, void *to, size_t count, int type, void *comm, void *stream) {
    CALL("%p, %p, %zu, type %d, %p, %p", from, to, count, type, comm, stream);
}

int ncclAllReduce(void *from, void *to, size_t count, int type, int op, void *comm, void *stream) {
    CALL("%p, %p, %zu, type %d, op %d, %p, %p", from, to, count, type, op, comm, stream);
}

int ncclReduce(void *from, void *to, size_t count, int type, int op, int root, void *comm, void *stream) {
    CALL("%p, %p, %zu, type %d, op %d, root %d, %p, %p", from, to, count, type, op, root, comm, stream);
}

int ncclBroadcast(void *from, void *to, size_t count, int type, int root, void *comm, void *stream) {
    CALL("%p, %p, %zu, type %d, root %d, %p, %p", from, to, count, type, root, comm, stream);
}

const char *ncclGetErrorString(int code) { return code == 6 ? "remote error" : NULL; }

const char *ncclGetLastError(void *comm) { return comm ? "as the test asked" : ""; }
