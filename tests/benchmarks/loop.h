/* What both programs of the proxy's benchmark share: a clock, timers, sockets, growing buffers.
 *
 * One thread, one epoll. A timer is a member of what it wakes; it is in the heap once, or not at all. Timers are exact
 * to some ten microseconds, because what is measured with them is a fraction of a millisecond.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NEVER UINT64_MAX

static void die(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    exit(2);
}

static inline uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void *grown(void *memory, size_t bytes) {
    void *more = realloc(memory, bytes);
    if (!more) die("out of memory");
    return more;
}

/* --- timers: a binary heap ------------------------------------------------------------------------------------- */

struct timer {
    uint64_t at_ns;
    uint32_t place; /* in the heap, from 1; 0: not in it */
    bool is_limit;  /* for those who have two */
};

static struct timer **heap;
static uint32_t heap_used, heap_room;

static void heap_put(struct timer *timer, uint32_t place) {
    heap[place] = timer;
    timer->place = place;
}

static void heap_settle(struct timer *timer, uint32_t place) {
    while (place > 1 && heap[place / 2]->at_ns > timer->at_ns) {
        heap_put(heap[place / 2], place);
        place /= 2;
    }
    for (uint32_t child; (child = 2 * place) <= heap_used; place = child) {
        if (child < heap_used && heap[child + 1]->at_ns < heap[child]->at_ns) child++;
        if (heap[child]->at_ns >= timer->at_ns) break;
        heap_put(heap[child], place);
    }
    heap_put(timer, place);
}

static void timer_stop(struct timer *timer) {
    uint32_t place = timer->place;
    if (!place) return;
    timer->place = 0;
    struct timer *last = heap[heap_used--];
    if (last != timer) heap_settle(last, place);
}

static void timer_start(struct timer *timer, uint64_t at_ns) {
    timer_stop(timer);
    timer->at_ns = at_ns;
    if (heap_used + 2 > heap_room) heap = grown(heap, sizeof *heap * (heap_room = heap_room ? 2 * heap_room : 1024));
    heap_settle(timer, ++heap_used);
}

/* The next timer that is due, taken out of the heap; NULL: none is. */
static struct timer *timer_due(uint64_t now) {
    if (!heap_used || heap[1]->at_ns > now) return NULL;
    struct timer *timer = heap[1];
    timer_stop(timer);
    return timer;
}

/* Wait for events, and no longer than until the next timer. */
static int wait_for_events(int epoll, struct epoll_event *events, int room) {
    struct timespec pause = {0}, *limit = NULL;
    if (heap_used) {
        uint64_t now = now_ns(), left = heap[1]->at_ns > now ? heap[1]->at_ns - now : 0;
        pause.tv_sec = (time_t)(left / 1000000000u);
        pause.tv_nsec = (long)(left % 1000000000u);
        limit = &pause;
    }
    int count = epoll_pwait2(epoll, events, room, limit, NULL);
    if (count < 0 && errno != EINTR) die("epoll: %s", strerror(errno));
    return count < 0 ? 0 : count;
}

/* --- buffers --------------------------------------------------------------------------------------------------- */

struct buffer {
    char *bytes;
    size_t used, room;
};

static inline void buffer_add(struct buffer *buffer, const void *bytes, size_t count) {
    if (buffer->used + count > buffer->room)
        buffer->bytes = grown(buffer->bytes, buffer->room = 2 * (buffer->used + count));
    memcpy(buffer->bytes + buffer->used, bytes, count);
    buffer->used += count;
}

static inline void buffer_drop(struct buffer *buffer, size_t count) {
    memmove(buffer->bytes, buffer->bytes + count, buffer->used - count);
    buffer->used -= count;
}

static inline void buffer_free(struct buffer *buffer) {
    free(buffer->bytes);
    memset(buffer, 0, sizeof *buffer);
}

/* --- sockets --------------------------------------------------------------------------------------------------- */

static void watch(int epoll, int how, int fd, uint32_t events, void *what) {
    struct epoll_event event = {.events = events, .data.ptr = what};
    if (epoll_ctl(epoll, how, fd, &event) < 0) die("epoll_ctl: %s", strerror(errno));
}

static void without_delay(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static struct sockaddr_in address_of(uint32_t host, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(host);
    return address;
}

/* Timers without the kernel's slack, every file descriptor that we may have, and no signal for a peer that left. */
static void prepare_process(void) {
    struct rlimit files;
    prctl(PR_SET_TIMERSLACK, 1UL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

/* The value of a header in a head that ends with an empty line and a NUL, at the first byte that is not a blank; NULL: not there. */
static inline const char *header_of(const char *head, const char *name) {
    size_t length = strlen(name);
    for (const char *line = strchr(head, '\n'); line && line[1] != '\r' && line[1]; line = strchr(line + 1, '\n'))
        if (!strncasecmp(line + 1, name, length) && line[1 + length] == ':')
            return line + 2 + length + strspn(line + 2 + length, " ");
    return NULL;
}
