/* The two ends of a raw blast, for benchmarks/router_blast.py, which compiles this with the system's compiler.
 *
 *   send DEVICE SOURCE DESTINATION SEGMENTS SEGMENT_BYTES  puts units of TCP segments into a device until it is ended
 *   forward READ_FD WRITE_FD MILLISECONDS                  the yardstick: reads a unit, writes it, and nothing else
 *
 * A unit goes through a packet socket with a virtio header, so the kernel hands it to the device's reader whole, as it
 * does with what its own TCP sends.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { LARGEST_UNIT_BYTES = 65536 + 64 };

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static double seconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

static int send_units(const char *device, const char *source, const char *destination, int segments, int segment_bytes)
{
    static unsigned char unit[LARGEST_UNIT_BYTES];
    struct virtio_net_hdr *vnet = (void *)unit;
    struct iphdr *ip = (void *)(unit + sizeof *vnet);
    struct tcphdr *tcp = (void *)(ip + 1);
    int packet_bytes = sizeof *ip + sizeof *tcp + segments * segment_bytes, on = 1;
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP)};
    int packets = socket(AF_PACKET, SOCK_RAW, 0); /* protocol 0: it receives nothing */
    if (packets < 0)
        fail("socket");
    if (setsockopt(packets, SOL_PACKET, PACKET_VNET_HDR, &on, sizeof on))
        fail("PACKET_VNET_HDR");
    if (setsockopt(packets, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof on))
        fail("PACKET_QDISC_BYPASS");
    to.sll_ifindex = if_nametoindex(device);
    if (!to.sll_ifindex)
        fail(device);
    *vnet = (struct virtio_net_hdr){
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = VIRTIO_NET_HDR_GSO_TCPV4,
        .hdr_len = sizeof *ip + sizeof *tcp, .gso_size = segment_bytes, .csum_start = sizeof *ip, .csum_offset = 16};
    *ip = (struct iphdr){.version = 4, .ihl = 5, .tot_len = htons(packet_bytes), .ttl = 64, .protocol = IPPROTO_TCP,
                         .saddr = inet_addr(source), .daddr = inet_addr(destination)};
    unsigned sum = 0;
    for (int at = 0; at < 10; at++)
        sum += ((unsigned short *)ip)[at];
    sum = (sum & 0xffff) + (sum >> 16);
    ip->check = ~(sum + (sum >> 16));
    *tcp = (struct tcphdr){.source = htons(4000), .dest = htons(5000), .doff = 5, .ack = 1, .window = htons(500)};
    for (;;) {
        /* A full device refuses. Its reader is what is measured, and finds more than this sleep lasts. */
        if (sendto(packets, unit, sizeof *vnet + packet_bytes, 0, (void *)&to, sizeof to) < 0)
            nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
}

static int forward(int from, int to, double for_s)
{
    static unsigned char unit[LARGEST_UNIT_BYTES];
    unsigned long units = 0, bytes = 0, refused = 0;
    double start_s = seconds(CLOCK_MONOTONIC), cpu_s = seconds(CLOCK_PROCESS_CPUTIME_ID), end_s = start_s + for_s;
    fcntl(from, F_SETFL, fcntl(from, F_GETFL) & ~O_NONBLOCK);
    struct pollfd first = {.fd = from, .events = POLLIN};
    if (poll(&first, 1, 10000) != 1)
        fail("nothing came");
    for (;;) {
        long got = read(from, unit, sizeof unit);
        if (got < 0)
            fail("read");
        refused += write(to, unit, got) != got;
        bytes += got - sizeof(struct virtio_net_hdr);
        if (!(++units & 63) && seconds(CLOCK_MONOTONIC) >= end_s)
            break;
    }
    printf("{\"units\": %lu, \"bytes\": %lu, \"refused\": %lu, \"elapsed_s\": %.6f, \"cpu_s\": %.6f}\n", units, bytes,
           refused, seconds(CLOCK_MONOTONIC) - start_s, seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu_s);
    return 0;
}

int main(int count, char **given)
{
    if (count == 7 && !strcmp(given[1], "send"))
        return send_units(given[2], given[3], given[4], atoi(given[5]), atoi(given[6]));
    if (count == 5 && !strcmp(given[1], "forward"))
        return forward(atoi(given[2]), atoi(given[3]), atoi(given[4]) / 1e3);
    fputs("see the comment at the top of router_blast.c\n", stderr);
    return 2;
}
