/* The arithmetic of detcoll/emulation/lab/line.py, function by function; the theory is there. */

#include "line.h"

enum { PROBE_HOST = 3, PROBE_BYTES = 64, PROBE_PROTOCOL = 253, PROBE_AT = IP + 20, BUCKET_BITS = 14, MOST_DRAWS = 8192 };

static const double CATCH_UP_NS = 1e7;

/* One record of detcoll/emulation/lab/log.py. */
typedef struct __attribute__((packed)) {
    int64_t time_ns;
    uint16_t source_site, destination_site;
    uint32_t source_address, destination_address;
    uint16_t source_port, destination_port;
    uint8_t protocol, dropped;
    uint16_t segments, dropped_segments;
    uint32_t payload_bytes, wire_bytes, queue_bytes;
} record;

static void depart(area *wide, double end_ns, piece what);
static void take_in(area *wide, int source, unit *came, int64_t now_ns, int is_tenant);

static double next_draw(area *wide, draws *from)
{
    if (from->at == from->count) {
        if (!from->values)
            from->values = allocate(MOST_DRAWS * sizeof *from->values);
        from->at = 0;
        from->count = wide->draw(from->kind, from->index, from->values, MOST_DRAWS);
        require(from->count <= MOST_DRAWS, "more random numbers than there is room for");
        if (from->count <= 0) { /* the router ends soon; until then nothing may come of this for ever */
            wide->has_failed = 1;
            from->values[0] = from->values[1] = INFINITY;
            from->count = 2;
        }
    }
    return from->values[from->at++];
}

static path *path_of(const area *wide, int source, int destination, int is_reserved)
{
    return &wide->paths[(source * wide->sites + destination) * 2 + is_reserved];
}

static port *port_of(const area *wide, stage at, int site)
{
    return &wide->ports[at == UPLINK ? site : wide->sites + site];
}

static int is_before(const event *one, const event *other)
{
    return one->due_ns < other->due_ns || (one->due_ns == other->due_ns && one->order < other->order);
}

static int is_awaited(const event *one)
{
    return !one->what.unit || one->what.unit->data[HOST] != PROBE_HOST;
}

static void push(area *wide, double due_ns, stage at, int site, piece what)
{
    if (wide->heap_count == wide->heap_size) {
        wide->heap_size = wide->heap_size ? 2 * wide->heap_size : 1024;
        wide->heap = realloc(wide->heap, wide->heap_size * sizeof *wide->heap);
        require(wide->heap != NULL, "no memory");
    }
    event added = {due_ns, wide->order++, at, site, what};
    wide->awaited_count += is_awaited(&added);
    unsigned hole = wide->heap_count++;
    while (hole && is_before(&added, &wide->heap[(hole - 1) / 2])) {
        wide->heap[hole] = wide->heap[(hole - 1) / 2];
        hole = (hole - 1) / 2;
    }
    wide->heap[hole] = added;
}

static event pop(area *wide)
{
    event first = wide->heap[0], last = wide->heap[--wide->heap_count];
    unsigned hole = 0, count = wide->heap_count;
    for (unsigned child; (child = 2 * hole + 1) < count; hole = child) {
        if (child + 1 < count && is_before(&wide->heap[child + 1], &wide->heap[child]))
            child++;
        if (!is_before(&wide->heap[child], &last))
            break;
        wide->heap[hole] = wide->heap[child];
    }
    wide->heap[hole] = last;
    wide->awaited_count -= is_awaited(&first);
    return first;
}

static double others_ns(const area *wide)
{
    return sooner(wide->catch_up_ns, wide->probe_ns);
}

double area_next_ns(const area *wide)
{
    return wide->heap_count ? sooner(wide->heap[0].due_ns, others_ns(wide)) : others_ns(wide);
}

int area_is_urgent(const area *wide)
{
    return wide->heap_count && wide->heap[0].due_ns <= others_ns(wide) && is_awaited(wide->heap);
}

int area_is_awaited(const area *wide)
{
    return wide->awaited_count > 0;
}

static void count_delay(delays *its, double delay_ns)
{
    if (2 * its->used >= its->size) {
        delays old = *its;
        its->size = old.size ? 2 * old.size : 64;
        its->buckets = allocate(its->size * sizeof *its->buckets);
        its->counts = allocate(its->size * sizeof *its->counts);
        for (unsigned each = 0; each < old.size; each++) {
            if (!old.counts[each])
                continue;
            unsigned slot = old.buckets[each] & (its->size - 1);
            while (its->counts[slot])
                slot = (slot + 1) & (its->size - 1);
            its->buckets[slot] = old.buckets[each];
            its->counts[slot] = old.counts[each];
        }
        free(old.buckets);
        free(old.counts);
    }
    int64_t bucket = (int64_t)delay_ns >> BUCKET_BITS;
    unsigned slot = bucket & (its->size - 1);
    while (its->counts[slot] && its->buckets[slot] != bucket)
        slot = (slot + 1) & (its->size - 1);
    its->used += !its->counts[slot];
    its->buckets[slot] = bucket;
    its->counts[slot]++;
    if (delay_ns > its->longest_ns)
        its->longest_ns = delay_ns;
}

static double floor_divided(double value, double divisor)
{
    double quotient = (value - modulo(value, divisor)) / divisor, whole = floor(quotient);
    return quotient - whole > 0.5 ? whole + 1.0 : whole;
}

/* Returns how many segments fit into a room, and sets their wire bytes. */
static int fitting(const shape *its, double room, int *wire_bytes)
{
    int taken = its->segments;
    if (its->wire_bytes > room) {
        double whole = floor_divided(room, its->segment_bytes + its->header_bytes);
        taken = whole < 0 ? 0 : whole < its->segments - 1 ? (int)whole : its->segments - 1;
    }
    *wire_bytes = wire_bytes_of(its, taken);
    return taken;
}

void area_flush(area *wide)
{
    if (wide->record_bytes && !wide->log(wide->records, wide->record_bytes))
        wide->has_failed = 1;
    wide->record_bytes = 0;
}

/* Counts a unit that has reached its uplink, of which some segments go on, and logs it. */
static void note(area *wide, path *its, const unit *came, const shape *whole, int taken, double queued, int64_t now_ns)
{
    if (taken) {
        int wire_bytes = wire_bytes_of(whole, taken);
        its->units++;
        its->segments += taken;
        its->wire_bytes += wire_bytes;
        its->payload_bytes += wire_bytes - taken * whole->header_bytes;
    }
    if (!wide->log)
        return;
    const uint8_t *data = came->data, *ports = data + IP + (data[IP] & 15) * 4;
    int has_ports = !is_later_fragment(data) && (data[IP + 9] == TCP || data[IP + 9] == UDP)
                    && came->bytes >= ports - data + 4;
    record made = {now_ns, its->source, its->destination, get_number(data + IP + 12, 4), get_number(data + IP + 16, 4),
                   has_ports ? get_number(ports, 2) : 0, has_ports ? get_number(ports + 2, 2) : 0, whole->protocol,
                   taken < whole->segments, whole->segments, whole->segments - taken, whole->payload_bytes,
                   whole->wire_bytes, (uint32_t)rint(queued)};
    memcpy(wide->records + wide->record_bytes, &made, sizeof made);
    wide->record_bytes += sizeof made;
    if (wide->record_bytes + (int)sizeof made > LOG_BYTES)
        area_flush(wide);
}

/* Lets go on what a port has done by now_ns. */
static void settle(area *wide, stage at, int site, double now_ns)
{
    port *its = port_of(wide, at, site);
    double end_ns;
    piece what;
    while (next_done(its, now_ns, &end_ns, &what)) {
        if (at == UPLINK)
            depart(wide, end_ns, what);
        else
            push(wide, end_ns, DONE, 0, what);
    }
}

/* Lets a best-effort unit go on once its port is done with it. */
static void after(area *wide, port *its, double end_ns, piece what, stage at, int site)
{
    if (wide->has_classes) {
        if (!its->waiting_count)
            push(wide, end_ns, at, site, (piece){0});
        remember(its, end_ns, what);
    } else if (at == UPLINK) { /* nobody can overtake it */
        depart(wide, end_ns, what);
    } else {
        push(wide, end_ns, DONE, 0, what);
    }
}

/* Returns the head of a unit, and frees the rest. */
static unit *head_of(area *wide, unit *whole, const shape *its, int taken)
{
    unit *head = cut(&wide->units, whole, its, 0, taken);
    if (head != whole)
        unit_free(&wide->units, whole);
    return head;
}

static void enter(area *wide, path *its, unit *came, const shape *whole, int64_t now_ns)
{
    port *up = its->up;
    int taken = whole->segments, wire_bytes = whole->wire_bytes;
    double room = room_bytes(up, now_ns);
    if (wire_bytes > room) {
        taken = fitting(whole, room, &wire_bytes);
        its->up_drops += whole->segments - taken;
    }
    note(wide, its, came, whole, taken, up->limit_bytes - room + wire_bytes, now_ns);
    if (!taken) {
        unit_free(&wide->units, came);
        return;
    }
    double end_ns = take(up, wire_bytes, now_ns, now_ns, NAN);
    came = head_of(wide, came, whole, taken);
    after(wide, up, end_ns, (piece){its, came, wire_bytes, now_ns}, UPLINK, its->source);
}

static void enter_reserved(area *wide, path *its, unit *came, const shape *whole, int64_t now_ns)
{
    port *up = its->up;
    int taken = whole->segments, wire_bytes = whole->wire_bytes;
    double left = tokens(&its->policer, now_ns, wide->asleep_ns);
    if (wire_bytes > left) {
        taken = fitting(whole, left, &wire_bytes);
        its->policed += whole->segments - taken;
    }
    double room = reserved_room_bytes(up, now_ns);
    if (wire_bytes > room) {
        int before = taken;
        taken = fitting(whole, room, &wire_bytes);
        its->up_drops += before - taken;
    }
    note(wide, its, came, whole, taken, up->limit_bytes - room + wire_bytes, now_ns);
    if (!taken) {
        unit_free(&wide->units, came);
        return;
    }
    its->policer.tokens -= wire_bytes;
    settle(wide, UPLINK, its->source, later(now_ns, overtaking_ns(up, now_ns)));
    double end_ns = take_first(up, wire_bytes, now_ns, now_ns);
    came = head_of(wide, came, whole, taken);
    depart(wide, end_ns, (piece){its, came, wire_bytes, now_ns});
}

static void advance(area *wide, bursts *its, port *up, double now_ns)
{
    while (its->at_ns <= now_ns) {
        double gap_ns = next_draw(wide, &its->draws), offered = next_draw(wide, &its->draws);
        if (isinf(gap_ns)) {
            its->at_ns = gap_ns;
            return;
        }
        double room = room_bytes(up, its->at_ns), taken = offered;
        its->offered_bytes += (int64_t)offered;
        if (offered > room) {
            taken = room > 0 ? floor_divided(room, its->packet_bytes) * its->packet_bytes : 0;
            its->dropped_bytes += (int64_t)(offered - taken);
        }
        if (taken > 0)
            take(up, (int)taken, its->at_ns, its->at_ns, NAN);
        its->at_ns += gap_ns;
    }
}

static void take_in(area *wide, int source, unit *came, int64_t now_ns, int is_tenant)
{
    const uint8_t *data = came->data;
    shape whole = shape_of(data, came->bytes);
    int is_ours = came->bytes > HOST && data[DESTINATION] == 10 && data[DESTINATION + 1] == 77;
    int destination = is_ours ? data[DESTINATION + 2] : source;
    if (destination >= wide->sites || destination == source || !whole.segments) {
        wide->unroutable++;
        unit_free(&wide->units, came);
        return;
    }
    if (wide->bursts)
        advance(wide, &wide->bursts[source], &wide->ports[source], now_ns);
    path *reserved = path_of(wide, source, destination, 1);
    if (reserved->is_reserved && !is_tenant && wide->is_marked[data[IP + 1] >> 2])
        enter_reserved(wide, reserved, came, &whole, now_ns);
    else
        enter(wide, path_of(wide, source, destination, 0), came, &whole, now_ns);
}

void area_arrive(area *wide, int source, unit *came, int64_t now_ns, int is_tenant)
{
    if (came->bytes > HOST && came->data[HOST] == PROBE_HOST) { /* nobody but the router sends probes */
        wide->unroutable++;
        unit_free(&wide->units, came);
        return;
    }
    take_in(wide, source, came, now_ns, is_tenant);
}

static int is_down(const area *wide, const path *its, double left_ns, double due_ns)
{
    int low = its->source < its->destination ? its->source : its->destination;
    int high = its->source + its->destination - low;
    for (int each = 0; each < wide->failure_count; each++) {
        const failure *one = &wide->failures[each];
        if ((one->low < 0 || (one->low == low && one->high == high)) && one->start_ns <= due_ns
            && left_ns < one->end_ns)
            return 1;
    }
    return 0;
}

/* Sends a unit on its path, unless the link fails meanwhile. */
static void send_on(area *wide, piece what, double left_ns)
{
    path *its = what.path;
    double due_ns = left_ns + its->delay_ns;
    if (its->jitter_ns > 0) {
        due_ns = later(its->last_due_ns, due_ns + next_draw(wide, &its->jitters) * its->jitter_ns);
        its->last_due_ns = due_ns;
    }
    if (is_down(wide, its, left_ns - wide->opened_ns, due_ns - wide->opened_ns)) {
        shape whole = shape_of(what.unit->data, what.unit->bytes);
        its->failed += whole.segments;
        unit_free(&wide->units, what.unit);
        return;
    }
    push(wide, due_ns, ARRIVES, 0, what);
}

/* Sends a unit on its path whose last bit has left the uplink at end_ns, without the segments that are lost. */
static void depart(area *wide, double end_ns, piece what)
{
    path *its = what.path;
    if (!its->loses) {
        send_on(wide, what, end_ns);
        return;
    }
    shape whole = shape_of(what.unit->data, what.unit->bytes);
    int first = 0, is_kept = 0;
    double at = its->gap;
    while (first <= whole.segments) {
        int is_lost = at < whole.segments, end = is_lost ? (int)at : whole.segments;
        if (is_lost) {
            its->lost++;
            at += 1 + next_draw(wide, &its->gaps);
        }
        if (end > first) {
            int before = wire_bytes_of(&whole, first), through = wire_bytes_of(&whole, end);
            double left_ns = end_ns - (what.wire_bytes - through) * its->up->ns_per_byte;
            unit *part = cut(&wide->units, what.unit, &whole, first, end);
            is_kept |= part == what.unit;
            send_on(wide, (piece){its, part, through - before, what.came_ns}, left_ns);
        }
        first = end + 1;
    }
    its->gap = at - whole.segments;
    if (!is_kept)
        unit_free(&wide->units, what.unit);
}

/* Takes a unit into its downlink whose last bit arrives at due_ns, as much of it as fits. */
static void pass_downlink(area *wide, piece what, double due_ns)
{
    path *its = what.path;
    port *down = its->down;
    double first_ns = due_ns - what.wire_bytes * its->up->ns_per_byte;
    /* What leaves while the unit comes in makes room for it. */
    double room = its->is_reserved ? reserved_room_bytes(down, first_ns) : room_bytes(down, first_ns);
    room += (due_ns - first_ns) * down->bytes_per_ns;
    if (what.wire_bytes > room) {
        shape whole = shape_of(what.unit->data, what.unit->bytes);
        int taken = fitting(&whole, room, &what.wire_bytes);
        its->down_drops += whole.segments - taken;
        if (!taken) {
            unit_free(&wide->units, what.unit);
            return;
        }
        what.unit = head_of(wide, what.unit, &whole, taken);
    }
    if (its->is_reserved) {
        settle(wide, DOWNLINK, its->destination, later(due_ns, overtaking_ns(down, first_ns)));
        push(wide, take_first(down, what.wire_bytes, first_ns, due_ns), DONE, 0, what);
    } else {
        double end_ns = take(down, what.wire_bytes, first_ns, due_ns, what.came_ns + its->delay_ns);
        after(wide, down, end_ns, what, DOWNLINK, its->destination);
    }
}

static unit *probe_of(area *wide, int source, int destination, int origin, int64_t sent_ns, int64_t so_far_ns)
{
    unit *made = unit_new(&wide->units, VNET_BYTES + PROBE_BYTES);
    uint8_t *ip = made->data + IP;
    memset(made->data, 0, made->bytes);
    ip[0] = 0x45;
    ip[3] = PROBE_BYTES;
    ip[6] = 0x40;
    ip[8] = 64;
    ip[9] = PROBE_PROTOCOL;
    memcpy(ip + 12, (uint8_t[]){10, 77, source, PROBE_HOST, 10, 77, destination, PROBE_HOST}, 8);
    put_number(made->data + PROBE_AT, 2, origin);
    put_number(made->data + PROBE_AT + 2, 8, sent_ns);
    put_number(made->data + PROBE_AT + 10, 8, so_far_ns);
    return made;
}

/* Lets the probes leave that do so by now_ns; links take turns, in the order of itertools.combinations. */
static void send_probes(area *wide, int64_t now_ns)
{
    while (wide->probe_ns <= now_ns) {
        int here = 0, before = wide->probes_sent++ % wide->links;
        while (before >= wide->sites - 1 - here)
            before -= wide->sites - 1 - here++;
        unit *sent = probe_of(wide, here, here + 1 + before, here, (int64_t)rint(wide->probe_ns), 0);
        wide->probe_ns += next_draw(wide, &wide->probe_gaps);
        take_in(wide, here, sent, now_ns, 1);
    }
}

/* Gives out a unit that has arrived, or sends a probe back. */
static void hand_over(area *wide, piece what, double due_ns, int64_t now_ns)
{
    const uint8_t *data = what.unit->data;
    double way_ns = due_ns - what.came_ns;
    count_delay(&what.path->delays, way_ns);
    if (data[HOST] != PROBE_HOST) {
        if (wide->arrival_count == wide->arrival_size) {
            wide->arrival_size = wide->arrival_size ? 2 * wide->arrival_size : 1024;
            wide->arrivals = realloc(wide->arrivals, wide->arrival_size * sizeof *wide->arrivals);
            require(wide->arrivals != NULL, "no memory");
        }
        wide->arrivals[wide->arrival_count++] = (arrival){due_ns, what.path->destination, what.unit};
        return;
    }
    int origin = get_number(data + PROBE_AT, 2), here = data[IP + 18], back = data[IP + 14];
    int64_t sent_ns = get_long(data + PROBE_AT + 2);
    int64_t so_far_ns = (int64_t)get_long(data + PROBE_AT + 10) + (int64_t)rint(way_ns);
    unit_free(&wide->units, what.unit);
    if (here == origin) {
        if (!wide->seen)
            wide->seen = allocate(LARGEST_HISTORY * sizeof *wide->seen);
        wide->seen[wide->probes_seen++ % LARGEST_HISTORY] = (seen){sent_ns, so_far_ns};
    } else {
        take_in(wide, here, probe_of(wide, here, back, origin, sent_ns, so_far_ns), now_ns, 1);
    }
}

void area_due(area *wide, int64_t now_ns)
{
    if (now_ns >= wide->catch_up_ns) {
        for (int site = 0; site < wide->sites; site++)
            advance(wide, &wide->bursts[site], &wide->ports[site], now_ns);
        wide->catch_up_ns = now_ns + CATCH_UP_NS;
    }
    send_probes(wide, now_ns);
    while (wide->heap_count && wide->heap[0].due_ns <= now_ns) {
        event next = pop(wide);
        if (next.stage == ARRIVES) {
            pass_downlink(wide, next.what, next.due_ns);
        } else if (next.stage == DONE) {
            hand_over(wide, next.what, next.due_ns, now_ns);
        } else { /* let go on what a port has done, and look again when the next unit may be */
            settle(wide, next.stage, next.site, next.due_ns);
            port *its = port_of(wide, next.stage, next.site);
            if (its->waiting_count)
                push(wide, next_done_ns(its), next.stage, next.site, (piece){0});
        }
    }
}
