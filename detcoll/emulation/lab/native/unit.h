/* Units, as detcoll/emulation/lab/unit.py has them, and the memory that they lie in. */

#ifndef DETCOLL_UNIT_H
#define DETCOLL_UNIT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    VNET_BYTES = 10,
    IP = VNET_BYTES,
    DESTINATION = IP + 16,
    HOST = DESTINATION + 3,
    LARGEST_UNIT_BYTES = 65536 + 64,
    TCP = 6,
    UDP = 17,
    NEEDS_CSUM = 1,
    GSO_ECN = 0x80,
    TCP_FIN_PSH = 0x09,
    TCP_CWR = 0x80,
};

typedef struct unit {
    struct unit *next; /* in a list of free ones */
    int bytes, size_class;
    uint8_t data[];
} unit;

/* Memory that was used last is used first: it is in the processor's cache. */
enum { SIZE_CLASSES = 4 };
static const int CLASS_BYTES[SIZE_CLASSES] = {256, 4096, 16384, LARGEST_UNIT_BYTES};

typedef struct {
    unit *free[SIZE_CLASSES];
} pool;

/* Ends the process where memory would be spoilt, which is worse. */
static inline void require(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "the lab's router: %s\n", what);
        abort();
    }
}

static inline void *allocate(size_t bytes)
{
    void *memory = calloc(1, bytes);
    require(memory != NULL, "no memory");
    return memory;
}

static inline unit *unit_new(pool *units, int bytes)
{
    require(0 <= bytes && bytes <= LARGEST_UNIT_BYTES, "a unit is too large");
    int size_class = 0;
    while (CLASS_BYTES[size_class] < bytes)
        size_class++;
    unit *made = units->free[size_class];
    if (made) {
        units->free[size_class] = made->next;
    } else {
        made = malloc(sizeof *made + CLASS_BYTES[size_class]);
        require(made != NULL, "no memory");
        made->size_class = size_class;
    }
    made->bytes = bytes;
    return made;
}

static inline void unit_free(pool *units, unit *ended)
{
    ended->next = units->free[ended->size_class];
    units->free[ended->size_class] = ended;
}

/* How a unit looks on the wire. */
typedef struct {
    int protocol, header_bytes, payload_bytes, segment_bytes, segments, wire_bytes;
} shape;

static inline int wire_bytes_of(const shape *whole, int segments)
{
    int payload = segments * whole->segment_bytes;
    return (payload < whole->payload_bytes ? payload : whole->payload_bytes) + segments * whole->header_bytes;
}

static inline int is_later_fragment(const uint8_t *data)
{
    return data[IP + 6] & 0x1f || data[IP + 7];
}

/* Has no segments where the unit holds no IPv4 packet. */
static inline shape shape_of(const uint8_t *data, int bytes)
{
    int size = bytes - IP;
    if (size < 20)
        return (shape){0};
    int ip_bytes = (data[IP] & 15) * 4, protocol = data[IP + 9], headers = ip_bytes;
    if (!is_later_fragment(data)) {
        if (protocol == TCP && size >= ip_bytes + 20)
            headers += (data[IP + ip_bytes + 12] >> 4) * 4;
        else if (protocol == UDP)
            headers += 8;
    }
    if (headers > size)
        return (shape){0};
    int payload = size - headers;
    if (data[1] && protocol == TCP && headers >= ip_bytes + 20) {
        uint16_t segment;
        memcpy(&segment, data + 4, sizeof segment);
        if (0 < segment && segment < payload) {
            int segments = (payload + segment - 1) / segment;
            return (shape){protocol, headers, payload, segment, segments, payload + segments * headers};
        }
    }
    return (shape){protocol, headers, payload, payload, 1, size};
}

static inline uint32_t get_number(const uint8_t *data, int bytes)
{
    uint32_t value = 0;
    for (int at = 0; at < bytes; at++)
        value = value << 8 | data[at];
    return value;
}

static inline void put_number(uint8_t *data, int bytes, uint64_t value)
{
    for (int at = bytes; at-- > 0; value >>= 8)
        data[at] = value & 0xff;
}

static inline uint64_t get_long(const uint8_t *data)
{
    return (uint64_t)get_number(data, 4) << 32 | get_number(data + 4, 4);
}

static inline uint32_t folded(uint32_t total)
{
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return total;
}

static inline uint32_t sum_of(const uint8_t *data, int bytes)
{
    uint32_t total = 0;
    for (int at = 0; at + 1 < bytes; at += 2)
        total += data[at] << 8 | data[at + 1];
    return total;
}

/* Returns the unit that holds segments first to end (exclusive) of another, which may be the other one itself. */
static inline unit *cut(pool *units, unit *whole, const shape *its, int first, int end)
{
    if (first == 0 && end == its->segments)
        return whole;
    int ip_bytes = (whole->data[IP] & 15) * 4, tcp = IP + ip_bytes, payload_at = IP + its->header_bytes;
    int from = first * its->segment_bytes, to = end * its->segment_bytes;
    int payload = (to < its->payload_bytes ? to : its->payload_bytes) - from;
    int is_single = end - first == 1, gso_type = whole->data[1];
    unit *piece = unit_new(units, payload_at + payload);
    uint8_t *made = piece->data;
    memcpy(made, whole->data, payload_at);
    memcpy(made + payload_at, whole->data + payload_at + from, payload);
    if (first) {
        made[tcp + 13] &= 0xff ^ TCP_CWR;
        gso_type &= 0xff ^ GSO_ECN;
    }
    if (end != its->segments)
        made[tcp + 13] &= 0xff ^ TCP_FIN_PSH;
    uint16_t facts[4] = {its->header_bytes, is_single ? 0 : its->segment_bytes, ip_bytes, 16};
    made[0] = NEEDS_CSUM;
    made[1] = is_single ? 0 : gso_type;
    memcpy(made + 2, facts, sizeof facts);
    put_number(made + tcp + 4, 4, get_number(whole->data + tcp + 4, 4) + from);
    put_number(made + IP + 4, 2, get_number(whole->data + IP + 4, 2) + first);
    put_number(made + IP + 2, 2, its->header_bytes + payload);
    put_number(made + IP + 10, 2, 0);
    put_number(made + IP + 10, 2, 0xffff ^ folded(sum_of(made + IP, ip_bytes)));
    uint32_t pseudo = sum_of(made + IP + 12, 8) + TCP + its->header_bytes - ip_bytes + payload;
    put_number(made + tcp + 16, 2, folded(pseudo));
    return piece;
}

#endif
