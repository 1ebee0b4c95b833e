/* One end of a line and its policer; the theory is in detcoll/emulation/lab/port.py.
 *
 * Every sum and product has its operands in the order that Python has them, so that both give the same bits.
 */

#ifndef DETCOLL_PORT_H
#define DETCOLL_PORT_H

#include "unit.h"

#include <math.h>

enum { MOST_GAPS = 256 };

struct path;

/* A unit or what is left of it. */
typedef struct {
    struct path *path;
    unit *unit;
    int wire_bytes;
    int64_t came_ns;
} piece;

typedef struct {
    double end_ns;
    piece what;
} waiting;

typedef struct {
    double start_ns, end_ns;
} gap;

typedef struct {
    double bytes_per_ns, ns_per_byte, limit_bytes, packet_ns;
    double free_ns, reserved_free_ns, peak_bytes, reserved_peak_bytes, since_ns, delayed_ns;
    waiting *waiting; /* a ring */
    unsigned waiting_first, waiting_count, waiting_size;
    gap *gaps; /* a ring of MOST_GAPS */
    unsigned gap_first, gap_count;
} port;

static inline double later(double one, double other)
{
    return other > one ? other : one;
}

static inline double sooner(double one, double other)
{
    return other < one ? other : one;
}

static inline double room_bytes(const port *at, double now_ns)
{
    double busy_ns = at->free_ns - later(now_ns, at->reserved_free_ns);
    return busy_ns > 0 ? at->limit_bytes - busy_ns * at->bytes_per_ns : at->limit_bytes;
}

static inline double reserved_room_bytes(const port *at, double now_ns)
{
    double busy_ns = at->reserved_free_ns - now_ns;
    return busy_ns > 0 ? at->limit_bytes - busy_ns * at->bytes_per_ns : at->limit_bytes;
}

static inline double carried_ns(port *at, double came_ns, double most_ns)
{
    double carried = 0.0;
    while (at->gap_count && carried < most_ns) {
        gap *first = &at->gaps[at->gap_first % MOST_GAPS];
        double start_ns = later(first->start_ns, came_ns);
        double used_ns = sooner(later(first->end_ns - start_ns, 0.0), most_ns - carried);
        carried += used_ns;
        if (start_ns + used_ns < first->end_ns) {
            first->start_ns = start_ns + used_ns;
        } else {
            at->gap_first++;
            at->gap_count--;
        }
    }
    return carried;
}

/* Takes best-effort bytes; parts of them may have come since came_ns, where that is not NAN. */
static inline double take(port *at, int wire_bytes, double first_ns, double last_ns, double came_ns)
{
    double start_ns = at->free_ns;
    if (at->free_ns <= first_ns)
        at->since_ns = start_ns = first_ns;
    double takes_ns = wire_bytes * at->ns_per_byte;
    if (!isnan(came_ns) && at->gap_count)
        takes_ns -= carried_ns(at, came_ns, takes_ns);
    double end_ns = start_ns + takes_ns;
    at->free_ns = end_ns > last_ns ? end_ns : last_ns;
    double queued = (at->free_ns - later(last_ns, at->reserved_free_ns)) * at->bytes_per_ns;
    if (queued > at->peak_bytes)
        at->peak_bytes = queued;
    return at->free_ns;
}

/* What Python's % gives for a positive divisor. */
static inline double modulo(double value, double divisor)
{
    double rest = fmod(value, divisor);
    return rest < 0 ? rest + divisor : rest;
}

static inline double overtaking_ns(const port *at, double first_ns)
{
    if (at->reserved_free_ns > first_ns || at->free_ns <= first_ns)
        return later(at->reserved_free_ns, first_ns);
    double rest_ns = at->packet_ns - modulo(first_ns - at->since_ns, at->packet_ns);
    return sooner(first_ns + rest_ns, at->free_ns);
}

static inline double take_first(port *at, int wire_bytes, double first_ns, double last_ns)
{
    double takes_ns = wire_bytes * at->ns_per_byte;
    double end_ns = later(last_ns, overtaking_ns(at, first_ns) + takes_ns);
    if (first_ns > at->free_ns) {
        if (!at->gaps)
            at->gaps = allocate(MOST_GAPS * sizeof *at->gaps);
        if (at->gap_count == MOST_GAPS) {
            at->gap_first++;
            at->gap_count--;
        }
        at->gaps[(at->gap_first + at->gap_count++) % MOST_GAPS] = (gap){at->free_ns, first_ns};
    }
    at->reserved_free_ns = at->since_ns = end_ns;
    at->free_ns = later(end_ns, later(at->free_ns, first_ns) + takes_ns);
    at->delayed_ns += takes_ns;
    double queued = (end_ns - last_ns) * at->bytes_per_ns;
    if (queued > at->reserved_peak_bytes)
        at->reserved_peak_bytes = queued;
    return end_ns;
}

static inline void remember(port *at, double end_ns, piece what)
{
    if (at->waiting_count == at->waiting_size) {
        unsigned size = at->waiting_size ? 2 * at->waiting_size : 64;
        waiting *larger = allocate(size * sizeof *larger);
        for (unsigned each = 0; each < at->waiting_count; each++)
            larger[each] = at->waiting[(at->waiting_first + each) % at->waiting_size];
        free(at->waiting);
        at->waiting = larger;
        at->waiting_size = size;
        at->waiting_first = 0;
    }
    at->waiting[(at->waiting_first + at->waiting_count++) % at->waiting_size] =
        (waiting){end_ns - at->delayed_ns, what};
}

/* Gives the next of what is remembered, if it is done by now_ns. */
static inline int next_done(port *at, double now_ns, double *end_ns, piece *what)
{
    if (!at->waiting_count)
        return 0;
    const waiting *first = &at->waiting[at->waiting_first];
    *end_ns = first->end_ns + at->delayed_ns;
    if (*end_ns > now_ns)
        return 0;
    *what = first->what;
    at->waiting_first = (at->waiting_first + 1) % at->waiting_size;
    at->waiting_count--;
    return 1;
}

/* When the next of what is remembered is done, NAN if there is nothing. */
static inline double next_done_ns(const port *at)
{
    return at->waiting_count ? at->waiting[at->waiting_first].end_ns + at->delayed_ns : NAN;
}

typedef struct {
    double bytes_per_ns, burst_bytes, tokens;
    int64_t at_ns;
} policer;

static inline double tokens(policer *its, int64_t now_ns, double asleep_ns)
{
    double gained = its->tokens + (now_ns - its->at_ns) * its->bytes_per_ns;
    double most = its->burst_bytes + asleep_ns * its->bytes_per_ns;
    its->tokens = gained < most ? gained : most;
    its->at_ns = now_ns;
    return its->tokens;
}

#endif
