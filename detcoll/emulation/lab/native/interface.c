/* What detcoll/emulation/lab/native/area.py calls: lines are made of what Python has worked out, and read back. */

#include "line.h"

#define EXPORTED __attribute__((visibility("default")))

EXPORTED area *area_new(int sites, double opened_ns, double catch_up_ns, int has_classes, const uint8_t *is_marked,
                        draw_call draw, log_call log)
{
    require(1 <= sites && sites <= MOST_SITES, "no such number of sites");
    area *wide = allocate(sizeof *wide);
    wide->sites = sites;
    wide->opened_ns = opened_ns;
    wide->catch_up_ns = catch_up_ns;
    wide->probe_ns = INFINITY;
    wide->links = sites * (sites - 1) / 2;
    wide->ports = allocate(2 * sites * sizeof *wide->ports);
    wide->paths = allocate(2 * (size_t)sites * sites * sizeof *wide->paths);
    wide->has_classes = has_classes;
    memcpy(wide->is_marked, is_marked, sizeof wide->is_marked);
    wide->draw = draw;
    wide->log = log;
    if (log)
        wide->records = allocate(LOG_BYTES);
    wide->probe_gaps.kind = DRAW_PROBES;
    return wide;
}

static port *numbered_port(const area *wide, int index)
{
    require(0 <= index && index < 2 * wide->sites, "no such port");
    return &wide->ports[index];
}

static path *numbered_path(const area *wide, int index)
{
    require(0 <= index && index < 2 * wide->sites * wide->sites, "no such path");
    return &wide->paths[index];
}

/* index: uplinks, then downlinks. */
EXPORTED void area_port(area *wide, int index, double bytes_per_ns, double ns_per_byte, double limit_bytes,
                        double packet_ns)
{
    *numbered_port(wide, index) = (port){.bytes_per_ns = bytes_per_ns, .ns_per_byte = ns_per_byte,
                                         .limit_bytes = limit_bytes, .packet_ns = packet_ns};
}

/* index: by source, destination and class; gap: of segments until the first loss, NAN where nothing is lost. */
EXPORTED void area_path(area *wide, int index, int64_t delay_ns, double jitter_ns, double gap)
{
    path *its = numbered_path(wide, index);
    its->source = index / 2 / wide->sites;
    its->destination = index / 2 % wide->sites;
    its->up = &wide->ports[its->source];
    its->down = &wide->ports[wide->sites + its->destination];
    its->delay_ns = delay_ns;
    its->jitter_ns = jitter_ns;
    its->loses = !isnan(gap);
    its->gap = gap;
    its->gaps = (draws){.kind = DRAW_LOSSES, .index = index};
    its->jitters = (draws){.kind = DRAW_JITTER, .index = index};
}

EXPORTED void area_reserve(area *wide, int index, double bytes_per_ns, double burst_bytes)
{
    path *its = numbered_path(wide, index);
    its->is_reserved = 1;
    its->policer = (policer){bytes_per_ns, burst_bytes, burst_bytes, 0};
}

EXPORTED void area_bursts(area *wide, int site, double packet_bytes, double at_ns)
{
    require(0 <= site && site < wide->sites, "no such site");
    if (!wide->bursts)
        wide->bursts = allocate(wide->sites * sizeof *wide->bursts);
    wide->bursts[site] = (bursts){.packet_bytes = packet_bytes, .at_ns = at_ns,
                                  .draws = {.kind = DRAW_BURSTS, .index = site}};
}

EXPORTED void area_probes(area *wide, double next_ns)
{
    require(isinf(next_ns) || wide->links, "probes without a link");
    wide->probe_ns = next_ns;
}

EXPORTED void area_failure(area *wide, double start_ns, double end_ns, int low, int high)
{
    wide->failures = realloc(wide->failures, (wide->failure_count + 1) * sizeof *wide->failures);
    require(wide->failures != NULL, "no memory");
    wide->failures[wide->failure_count++] = (failure){start_ns, end_ns, low, high};
}

EXPORTED void area_take(area *wide, int source, const uint8_t *data, int bytes, int64_t now_ns, int is_tenant)
{
    require(0 <= source && source < wide->sites, "no such site");
    unit *came = unit_new(&wide->units, bytes);
    memcpy(came->data, data, bytes);
    area_arrive(wide, source, came, now_ns, is_tenant);
}

EXPORTED void area_advance(area *wide, int64_t now_ns)
{
    area_due(wide, now_ns);
}

/* Gives the first of what area_advance found and then forgets all before it; returns its bytes, -1 after the last. */
EXPORTED int area_arrival(area *wide, unsigned index, double *due_ns, int *destination, uint8_t *data)
{
    if (index >= wide->arrival_count) {
        wide->arrival_count = 0;
        return -1;
    }
    const arrival *one = &wide->arrivals[index];
    int bytes = one->unit->bytes;
    *due_ns = one->due_ns;
    *destination = one->destination;
    memcpy(data, one->unit->data, bytes);
    unit_free(&wide->units, one->unit);
    return bytes;
}

EXPORTED void area_write_log(area *wide)
{
    area_flush(wide);
}

EXPORTED double area_next(const area *wide)
{
    return area_next_ns(wide);
}

EXPORTED int area_urgent(const area *wide)
{
    return area_is_urgent(wide);
}

EXPORTED int area_awaited(const area *wide)
{
    return area_is_awaited(wide);
}

EXPORTED int area_under_way(const area *wide)
{
    return wide->heap_count;
}

EXPORTED int64_t area_unroutable(const area *wide)
{
    return wide->unroutable;
}

EXPORTED double *area_asleep(area *wide)
{
    return &wide->asleep_ns;
}

EXPORTED void area_peaks(const area *wide, int index, double peaks[2])
{
    const port *its = numbered_port(wide, index);
    peaks[0] = its->peak_bytes;
    peaks[1] = its->reserved_peak_bytes;
}

EXPORTED void area_counts(const area *wide, int index, int64_t counts[9])
{
    const path *its = numbered_path(wide, index);
    memcpy(counts, &its->units, 9 * sizeof *counts);
}

/* Fills buckets and counts where they are given; returns how many there are. */
EXPORTED int area_delays(const area *wide, int index, double *longest_ns, int64_t *buckets, int64_t *counts)
{
    const delays *its = &numbered_path(wide, index)->delays;
    int found = 0;
    *longest_ns = its->longest_ns;
    for (unsigned slot = 0; buckets && slot < its->size; slot++) {
        if (its->counts[slot]) {
            buckets[found] = its->buckets[slot];
            counts[found++] = its->counts[slot];
        }
    }
    return its->used;
}

EXPORTED void area_burst_counts(const area *wide, int site, int64_t counts[2])
{
    require(wide->bursts && 0 <= site && site < wide->sites, "no bursts of such a site");
    counts[0] = wide->bursts[site].offered_bytes;
    counts[1] = wide->bursts[site].dropped_bytes;
}

/* Fills pairs of when a probe was sent and how long it took, the oldest first; returns how many there are. */
EXPORTED int area_probes_seen(const area *wide, int64_t *sent, int64_t *pairs)
{
    int count = wide->probes_seen < LARGEST_HISTORY ? wide->probes_seen : LARGEST_HISTORY;
    *sent = wide->probes_sent;
    for (int each = 0; pairs && each < count; each++) {
        const seen *one = &wide->seen[(wide->probes_seen - count + each) % LARGEST_HISTORY];
        pairs[2 * each] = one->sent_ns;
        pairs[2 * each + 1] = one->took_ns;
    }
    return count;
}

EXPORTED void area_free(area *wide)
{
    for (unsigned each = 0; each < wide->arrival_count; each++)
        unit_free(&wide->units, wide->arrivals[each].unit);
    for (unsigned each = 0; each < wide->heap_count; each++)
        if (wide->heap[each].what.unit)
            unit_free(&wide->units, wide->heap[each].what.unit);
    for (int each = 0; each < 2 * wide->sites; each++) {
        port *its = &wide->ports[each];
        for (unsigned left = 0; left < its->waiting_count; left++)
            unit_free(&wide->units, its->waiting[(its->waiting_first + left) % its->waiting_size].what.unit);
        free(its->waiting);
        free(its->gaps);
    }
    for (int each = 0; each < 2 * wide->sites * wide->sites; each++) {
        path *its = &wide->paths[each];
        free(its->gaps.values);
        free(its->jitters.values);
        free(its->delays.buckets);
        free(its->delays.counts);
    }
    for (int site = 0; wide->bursts && site < wide->sites; site++)
        free(wide->bursts[site].draws.values);
    for (int size_class = 0; size_class < SIZE_CLASSES; size_class++) {
        for (unit *next, *each = wide->units.free[size_class]; each; each = next) {
            next = each->next;
            free(each);
        }
    }
    free(wide->probe_gaps.values);
    free(wide->ports);
    free(wide->paths);
    free(wide->bursts);
    free(wide->failures);
    free(wide->seen);
    free(wide->heap);
    free(wide->arrivals);
    free(wide->records);
    free(wide);
}
