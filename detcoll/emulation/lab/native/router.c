/* The loop of detcoll/emulation/lab/router.py: waits for units and for what is due, and moves it. */

#define _GNU_SOURCE
#include "line.h"

#include <errno.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))

enum { BATCH_UNITS = 8, FEW_UNITS = 4, AWAKE_NS = 120000, LAZY_NS = 1000000, TENANT_HOST = 2, SMALL_BYTES = 16384 };

typedef int64_t (*clock_call)(void);

typedef struct {
    area *area;
    struct pollfd *watched; /* sites, others beside them, the lab's socket, the lab's process */
    int sites, tenants, has_more;
    int64_t looked_ns;
    uint64_t handed_over, refused;
    double late_sum_ns, late_peak_ns;
    clock_call now_ns;
    unit *empty; /* a large one, to read into */
} router;

static int64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* descriptors: as watched has them.  now_ns: another clock, for tests. */
EXPORTED router *router_new(area *wide, const int *descriptors, int sites, int tenants, clock_call now_ns)
{
    require(!tenants || tenants == sites, "not a device of others for each site");
    router *its = allocate(sizeof *its);
    its->area = wide;
    its->sites = sites;
    its->tenants = tenants;
    its->watched = allocate((sites + tenants + 2) * sizeof *its->watched);
    for (int each = 0; each < sites + tenants + 2; each++)
        its->watched[each] = (struct pollfd){.fd = descriptors[each], .events = POLLIN};
    its->now_ns = now_ns ? now_ns : monotonic_ns;
    its->looked_ns = its->now_ns();
    return its;
}

EXPORTED void router_free(router *its)
{
    free(its->empty);
    free(its->watched);
    free(its);
}

/* Notes for how long nobody looked for arrivals before now: while at work, and past the time to wake up. */
EXPORTED void router_look(router *its, int64_t began_ns, double due_ns)
{
    int64_t now_ns = its->now_ns();
    double asleep_ns = began_ns - its->looked_ns + later(0.0, now_ns - due_ns);
    /* What is left in a device since the time before may have come in that. */
    its->area->asleep_ns = its->has_more ? later(its->area->asleep_ns, asleep_ns) : asleep_ns;
    its->looked_ns = now_ns;
    its->has_more = 0;
}

/* Takes what waits at a device, up to a batch; returns an error of the system, 0 if there is none. */
EXPORTED int router_read(router *its, int device)
{
    area *wide = its->area;
    require(0 <= device && device < its->sites + its->tenants, "no such device");
    for (int count = 0; count < BATCH_UNITS;) {
        if (!its->empty)
            its->empty = unit_new(&wide->units, LARGEST_UNIT_BYTES);
        unit *came = its->empty;
        ssize_t bytes = read(its->watched[device].fd, came->data, LARGEST_UNIT_BYTES);
        if (bytes < 0 && errno == EINTR)
            continue;
        if (bytes < 0)
            return errno == EAGAIN ? 0 : errno;
        int64_t now_ns = its->now_ns();
        if (now_ns - its->looked_ns > wide->asleep_ns)
            wide->asleep_ns = now_ns - its->looked_ns;
        if (bytes <= SMALL_BYTES) { /* does not hold so much memory for so little */
            came = unit_new(&wide->units, bytes);
            memcpy(came->data, its->empty->data, bytes);
        } else {
            came->bytes = bytes;
            its->empty = NULL;
        }
        int is_tenant = device >= its->sites;
        area_arrive(wide, is_tenant ? device - its->sites : device, came, now_ns, is_tenant);
        count++;
    }
    its->has_more = 1;
    return 0;
}

/* Writes what is due to the devices of its destinations. */
static void hand_over(router *its)
{
    area *wide = its->area;
    area_due(wide, its->now_ns());
    for (unsigned each = 0; each < wide->arrival_count; each++) {
        const arrival *one = &wide->arrivals[each];
        double late_ns = its->now_ns() - one->due_ns;
        its->late_sum_ns += late_ns;
        if (late_ns > its->late_peak_ns)
            its->late_peak_ns = late_ns;
        its->handed_over++;
        require(one->destination < its->sites, "no device for a site");
        int is_tenant = its->tenants && one->unit->data[HOST] == TENANT_HOST;
        int device = is_tenant ? its->sites + one->destination : one->destination;
        if (write(its->watched[device].fd, one->unit->data, one->unit->bytes) < 0)
            its->refused++;
        unit_free(&wide->units, one->unit);
    }
    wide->arrival_count = 0;
}

/* Sleeps until something can be read, or is due; returns what poll does. */
static int wait_until(router *its, double next_ns)
{
    int count = its->sites + its->tenants + 2;
    if (isinf(next_ns))
        return ppoll(its->watched, count, NULL, NULL);
    int64_t left_ns = (int64_t)ceil(later(0.0, next_ns - its->now_ns()));
    struct timespec left = {left_ns / 1000000000, left_ns % 1000000000};
    return ppoll(its->watched, count, &left, NULL);
}

/* When to look next at what is due, and when to wake up for it. */
EXPORTED double router_next(const router *its, double *wake_ns)
{
    const area *wide = its->area;
    double due_ns = area_next_ns(wide);
    if (!area_is_awaited(wide))
        due_ns += LAZY_NS;
    *wake_ns = due_ns;
    if (wide->heap_count <= FEW_UNITS && area_is_urgent(wide))
        *wake_ns -= AWAKE_NS;
    return due_ns;
}

/* Forwards until the lab asks for something (1) or is gone (2); less than 0 is an error of the system. */
EXPORTED int router_forward(router *its)
{
    area *wide = its->area;
    int devices = its->sites + its->tenants;
    for (;;) {
        double wake_ns, due_ns = router_next(its, &wake_ns);
        int64_t began_ns = its->now_ns();
        int ready = wait_until(its, wake_ns);
        if (ready < 0 && errno != EINTR)
            return -errno;
        router_look(its, began_ns, due_ns);
        for (int device = 0; ready > 0 && device < devices; device++) {
            int error = its->watched[device].revents ? router_read(its, device) : 0;
            if (error)
                return -error;
        }
        if (area_next_ns(wide) <= its->now_ns())
            hand_over(its);
        if (wide->has_failed)
            return -EIO;
        if (ready > 0 && its->watched[devices + 1].revents)
            return 2;
        if (ready > 0 && its->watched[devices].revents)
            return 1;
    }
}

EXPORTED void router_counts(const router *its, int64_t counts[2], double late_ns[2])
{
    counts[0] = its->handed_over;
    counts[1] = its->refused;
    late_ns[0] = its->late_sum_ns;
    late_ns[1] = its->late_peak_ns;
}
