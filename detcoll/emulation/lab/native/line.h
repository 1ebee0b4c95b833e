/* The lines of the emulated wide area, as detcoll/emulation/lab/line.py has them. */

#ifndef DETCOLL_LINE_H
#define DETCOLL_LINE_H

#include "port.h"

/* Random numbers are drawn in Python, many at a time, so both routers see the same ones. */
typedef enum { DRAW_LOSSES, DRAW_JITTER, DRAW_PROBES, DRAW_BURSTS } draw_kind;

/* Fills values and returns how many there are; 0 means that it failed. */
typedef int (*draw_call)(int kind, int index, double *values, int most);

/* Takes records of the log; returns whether it could. */
typedef int (*log_call)(const void *records, int bytes);

typedef struct {
    draw_kind kind;
    int index, at, count;
    double *values;
} draws;

/* Counts delays by bucket: open addressing, at most half full; an empty slot has no count. */
typedef struct {
    int64_t *buckets;
    uint64_t *counts;
    unsigned size, used;
    double longest_ns;
} delays;

typedef struct path {
    port *up, *down;
    int source, destination, is_reserved, loses;
    int64_t delay_ns;
    policer policer;
    draws gaps, jitters;
    double gap, jitter_ns, last_due_ns;
    delays delays;
    int64_t units, segments, wire_bytes, payload_bytes, up_drops, policed, lost, failed, down_drops;
} path;

typedef struct {
    double packet_bytes, at_ns;
    int64_t offered_bytes, dropped_bytes;
    draws draws;
} bursts;

typedef struct {
    double start_ns, end_ns;
    int low, high; /* -1 for every link */
} failure;

typedef enum { ARRIVES, DONE, UPLINK, DOWNLINK } stage;

typedef struct {
    double due_ns;
    uint64_t order;
    stage stage;
    int site; /* for UPLINK and DOWNLINK; the others have a piece */
    piece what;
} event;

typedef struct {
    double due_ns;
    int destination;
    unit *unit;
} arrival;

typedef struct {
    int64_t sent_ns, took_ns;
} seen;

/* An address has one byte for the site. */
enum { LARGEST_HISTORY = 65536, LOG_BYTES = 1 << 16, MOST_SITES = 256 };

typedef struct area {
    pool units;
    int sites;
    double opened_ns, catch_up_ns, asleep_ns;
    port *ports; /* uplinks, then downlinks */
    path *paths; /* by source, destination and class */
    int has_classes;
    uint8_t is_marked[64];
    bursts *bursts;
    failure *failures;
    int failure_count;
    double probe_ns;
    draws probe_gaps;
    int links;
    uint64_t probes_sent, probes_seen;
    seen *seen; /* a ring of LARGEST_HISTORY */
    event *heap;
    unsigned heap_count, heap_size;
    unsigned awaited_count; /* of the heap, all but probes */
    uint64_t order;
    arrival *arrivals;
    unsigned arrival_count, arrival_size;
    int64_t unroutable;
    draw_call draw;
    log_call log;
    uint8_t *records;
    int record_bytes;
    int has_failed; /* a call into Python did; it keeps the reason */
} area;

/* Takes the unit over. */
void area_arrive(area *wide, int source, unit *came, int64_t now_ns, int is_tenant);

/* Puts into arrivals what is to be handed over; whoever reads them frees their units and sets arrival_count to 0. */
void area_due(area *wide, int64_t now_ns);

double area_next_ns(const area *wide);
int area_is_urgent(const area *wide);
int area_is_awaited(const area *wide);
void area_flush(area *wide);

#endif
