/* The clients of the proxy's benchmark: many connections, one request at a time on each, and every answer looked at.
 *
 *     load --ports 8080 --connections 100 --requests 3 --stream --pace 100:100:32 --keys keys.txt
 *
 * An answer counts as good if its status is the expected one and it is whole: its length or its last chunk has come, and of a
 * stream also [DONE] and, unless --loose, exactly as many events as were ordered. Prints one JSON object: how many were good,
 * errors by what they were, seconds, and exact percentiles in milliseconds of the first byte of body (ttft; of a
 * stream: of its first event) and of the last one (e2e), both from the moment at which the request was sent, or, with
 * --fresh, at which its connection was begun.
 *
 *     --requests N    by each connection; else --seconds S: until then, and what is under way ends
 *     --ramp-ms T     the connections begin at random moments within T, so that they do not beat in step
 *     --pause-ms T    rest between two requests of a connection
 *     --fresh         a new connection for each request; without --ramp-ms all of them at once
 *     --sources N     from 127.0.0.1, .2, ... in turn, when one address has too few ports
 *     --leave-ms T    leave at a random moment within T of the request, or in the middle of sending it
 *     --slowly B:T    read only B bytes each T milliseconds, into a small receive buffer
 *     --tell-began    print a line "began" once every connection has had a first byte
 */
#include "loop.h"
#include <getopt.h>
#include <math.h>
#include <stddef.h>

enum state { RESTING, CONNECTING, SENDING, READING };
enum framing { BY_HEAD, BY_LENGTH, BY_CHUNKS, BY_CLOSE };
enum fault { BAD_STATUS, INCOMPLETE, NO_DONE, WRONG_EVENTS, NO_CONNECTION, TIMED_OUT, MALFORMED, FAULTS };
static const char *const FAULT_NAMES[FAULTS] = {"status",     "incomplete", "no_done",  "wrong_events",
                                                "no_connection", "timeout",    "malformed"};

struct client {
    struct timer timer; /* first: begins, leaves or reads */
    struct timer limit;
    int fd, number, asked, status;
    enum state state;
    enum framing framing;
    bool has_begun, leaves, is_used, closes, was_fresh, is_registered;
    uint64_t sent_at, first_at;
    size_t sent, left; /* bytes of the request; bytes of the answer's body or of this chunk, and its line end */
    int chunk_state;   /* 0: in its length, 1: in its extension, 2: in its bytes, 3: in the trailer, 4: ended */
    size_t line_length;
    uint32_t events;
    bool at_line_start, is_event;
    char tail[16]; /* of the body */
    size_t tail_used;
    struct buffer head, request;
};

struct samples {
    float *ms;
    size_t used, room;
};

static struct {
    int ports[16], port_count, connections, requests, expected, sources, chunks, padding;
    double seconds, ramp_ms, leave_ms, timeout_seconds, slow_ms, pause_ms;
    size_t slow_bytes;
    bool streams, fresh, loose, usage, tells_began;
    const char *pace, *model, *path;
} chosen = {.connections = 1, .expected = 200, .sources = 1, .timeout_seconds = 60, .pace = "0:0:1", .model = "bench",
            .path = "/v1/chat/completions", .chunks = 1, .padding = 400};

static char **keys;
static size_t key_count;
static int epoll, active, began_count;
static uint64_t deadline = NEVER, started_at;
static struct samples ttft, e2e;
static uint64_t good, faults[FAULTS], left_count, again_count, statuses[600];
static char first_fault[300];

static double random_share(void) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double)(state >> 11) / 9007199254740992.0;
}

static void keep(struct samples *samples, uint64_t ns) {
    if (samples->used == samples->room)
        samples->ms = grown(samples->ms, sizeof *samples->ms * (samples->room = samples->room ? 2 * samples->room : 4096));
    samples->ms[samples->used++] = (float)((double)ns / 1e6);
}

static void begin(struct client *one);

/* --- the life of a request ------------------------------------------------------------------------------------- */

static void hang_up(struct client *one) {
    if (one->fd >= 0) close(one->fd);
    one->fd = -1;
    one->is_used = one->is_registered = false;
}

/* The request is over, one way or another; the next one follows. */
static void rest(struct client *one) {
    timer_stop(&one->timer);
    timer_stop(&one->limit);
    one->state = RESTING;
    one->head.used = 0;
    if (chosen.fresh || one->closes) hang_up(one);
    uint64_t now = now_ns();
    if ((chosen.requests && one->asked >= chosen.requests) || now >= deadline) {
        hang_up(one);
        active--;
    } else {
        /* not here: a server that refuses at once would let us recurse */
        timer_start(&one->timer, now + (uint64_t)(chosen.pause_ms * 1e6));
    }
}

static void failed(struct client *one, enum fault fault, const char *why) {
    if (!first_fault[0]) {
        snprintf(first_fault, sizeof first_fault, "%s (status %d, %u events, request %d)", why, one->status, one->events,
                 one->asked);
        for (char *at = first_fault; *at; at++)
            if (*at == '"' || *at == '\\' || (unsigned char)*at < ' ') *at = '\'';
    }
    faults[fault]++;
    one->closes = true;
    rest(one);
}

static void ended(struct client *one) {
    uint64_t now = now_ns();
    if (one->status != chosen.expected) {
        failed(one, BAD_STATUS, one->head.used > 9 ? one->head.bytes : "");
        return;
    }
    if (chosen.streams && chosen.expected == 200) {
        if (one->tail_used < 6 || !memmem(one->tail, one->tail_used, "[DONE]", 6)) {
            failed(one, NO_DONE, "no [DONE] at the end");
            return;
        }
        if (!chosen.loose && one->events != (uint32_t)chosen.chunks + 1 + chosen.usage) {
            failed(one, WRONG_EVENTS, "more or fewer events than were ordered");
            return;
        }
    }
    good++;
    keep(&ttft, one->first_at - one->sent_at);
    keep(&e2e, now - one->sent_at);
    rest(one);
}

static void broke(struct client *one, const char *why) {
    if (one->state == READING && one->framing == BY_CLOSE) {
        one->closes = true;
        ended(one);
    } else if (!one->was_fresh && !one->head.used && (one->state == READING || one->state == SENDING) && !one->status) {
        again_count++; /* a kept connection that was closed before it could carry this: the request is sent again */
        uint64_t sent_at = one->sent_at;
        hang_up(one);
        one->asked--;
        begin(one);
        one->sent_at = sent_at;
    } else {
        failed(one, one->state == CONNECTING ? NO_CONNECTION : INCOMPLETE, why);
    }
}

static void send_request(struct client *one) {
    while (one->sent < one->request.used) {
        size_t until = one->leaves && one->number % 4 == 0 ? one->request.used / 2 : one->request.used;
        if (one->sent >= until) return; /* this one leaves before all of it was said */
        ssize_t count = send(one->fd, one->request.bytes + one->sent, until - one->sent, MSG_NOSIGNAL);
        if (count < 0 && errno == EAGAIN) {
            watch(epoll, EPOLL_CTL_MOD, one->fd, EPOLLIN | EPOLLOUT, one);
            return;
        }
        if (count < 0) {
            broke(one, strerror(errno));
            return;
        }
        one->sent += (size_t)count;
    }
    one->state = READING;
}

static void register_events(struct client *one, uint32_t events) {
    watch(epoll, one->is_registered ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, one->fd, events, one);
    one->is_registered = true;
}

static void connect_anew(struct client *one) {
    one->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP);
    if (one->fd < 0) die("socket: %s", strerror(errno));
    without_delay(one->fd);
    if (chosen.slow_bytes) {
        int bytes = 4096;
        setsockopt(one->fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
    }
    if (chosen.sources > 1) {
        int on = 1;
        struct sockaddr_in source = address_of(INADDR_LOOPBACK + (uint32_t)(one->number % chosen.sources), 0);
        setsockopt(one->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        if (bind(one->fd, (struct sockaddr *)&source, sizeof source) < 0) die("bind: %s", strerror(errno));
    }
    struct sockaddr_in address = address_of(INADDR_LOOPBACK, chosen.ports[one->number % chosen.port_count]);
    if (connect(one->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        failed(one, NO_CONNECTION, strerror(errno));
        return;
    }
    register_events(one, EPOLLIN | EPOLLOUT);
}

static void begin(struct client *one) {
    uint64_t now = now_ns();
    one->asked++;
    one->status = 0;
    one->events = 0;
    one->at_line_start = true;
    one->is_event = false;
    one->tail_used = one->sent = one->left = one->line_length = 0;
    one->chunk_state = 0;
    one->framing = BY_HEAD;
    one->closes = false;
    one->head.used = 0;
    one->sent_at = now;
    one->first_at = 0;
    timer_start(&one->limit, now + (uint64_t)(chosen.timeout_seconds * 1e9));
    one->leaves = chosen.leave_ms > 0;
    if (one->leaves) timer_start(&one->timer, now + (uint64_t)(chosen.leave_ms * 1e6 * random_share()));
    one->was_fresh = one->fd < 0;
    if (one->fd < 0) {
        one->state = CONNECTING;
        connect_anew(one);
    } else {
        one->state = SENDING;
        send_request(one);
        if (chosen.slow_bytes && one->state == READING) timer_start(&one->timer, now);
    }
}

/* --- answers --------------------------------------------------------------------------------------------------- */

static void has_first(struct client *one) {
    one->first_at = now_ns();
    if (one->has_begun) return;
    one->has_begun = true;
    if (++began_count == chosen.connections && chosen.tells_began) {
        puts("began");
        fflush(stdout);
    }
}

/* Events end with an empty line; what has only comments, lines that begin with a colon, is none. */
static void count_events(struct client *one, const char *bytes, size_t count) {
    for (const char *at = bytes, *end = bytes + count; at < end;) {
        if (*at == '\r') {
            at++;
        } else if (*at == '\n') {
            if (one->at_line_start && one->is_event) one->events++, one->is_event = false;
            one->at_line_start = true;
            at++;
        } else {
            if (one->at_line_start && *at != ':') {
                one->is_event = true;
                if (!one->first_at) has_first(one);
            }
            one->at_line_start = false;
            at = memchr(at, '\n', (size_t)(end - at));
            if (!at) return;
        }
    }
}

static void take_body(struct client *one, const char *bytes, size_t count) {
    if (!count) return;
    if (!chosen.streams) {
        if (!one->first_at) has_first(one);
        return;
    }
    count_events(one, bytes, count);
    if (count >= sizeof one->tail) {
        memcpy(one->tail, bytes + count - sizeof one->tail, one->tail_used = sizeof one->tail);
    } else {
        size_t kept = one->tail_used + count > sizeof one->tail ? sizeof one->tail - count : one->tail_used;
        memmove(one->tail, one->tail + one->tail_used - kept, kept);
        memcpy(one->tail + kept, bytes, count);
        one->tail_used = kept + count;
    }
}

/* Takes bytes of a chunked body; false: it is malformed. */
static bool take_chunks(struct client *one, const char *at, size_t count) {
    for (const char *end = at + count; at < end && one->chunk_state != 4;) {
        if (one->chunk_state == 2) {
            size_t some = (size_t)(end - at) < one->left ? (size_t)(end - at) : one->left;
            size_t body = one->left > 2 ? (some < one->left - 2 ? some : one->left - 2) : 0; /* 2: the line end */
            take_body(one, at, body);
            at += some;
            one->left -= some;
            if (!one->left) one->chunk_state = 0;
            continue;
        }
        char letter = *at++;
        if (one->chunk_state == 3) { /* a trailer ends with an empty line */
            if (letter == '\n') {
                if (!one->line_length) one->chunk_state = 4;
                one->line_length = 0;
            } else if (letter != '\r') {
                one->line_length++;
            }
        } else if (letter == '\n') {
            one->chunk_state = one->left ? 2 : 3;
            one->line_length = 0;
            if (one->left) one->left += 2;
        } else if (one->chunk_state == 0) {
            if (letter >= '0' && letter <= '9') one->left = 16 * one->left + (size_t)(letter - '0');
            else if ((letter | 32) >= 'a' && (letter | 32) <= 'f') one->left = 16 * one->left + (size_t)((letter | 32) - 'a' + 10);
            else if (letter == '\r' || letter == ';') one->chunk_state = 1;
            else return false;
        }
    }
    return true;
}

/* Reads the head if all of it is there; returns what follows it, NULL: not yet, or `one` has failed. */
static const char *take_head(struct client *one, size_t *rest_count) {
    char *end = memmem(one->head.bytes, one->head.used, "\r\n\r\n", 4);
    if (!end) return NULL;
    end[3] = 0;
    if (one->head.used < 12 || memcmp(one->head.bytes, "HTTP/1.", 7)) {
        failed(one, MALFORMED, "not HTTP");
        return NULL;
    }
    one->status = atoi(one->head.bytes + 9);
    if (one->status < 100 || one->status > 599) one->status = 599;
    const char *length = header_of(one->head.bytes, "content-length");
    const char *coding = header_of(one->head.bytes, "transfer-encoding");
    const char *connection = header_of(one->head.bytes, "connection");
    if (connection && !strncasecmp(connection, "close", 5)) one->closes = true;
    one->left = 0;
    one->framing = coding && !strncasecmp(coding, "chunked", 7) ? BY_CHUNKS : length ? BY_LENGTH : BY_CLOSE;
    if (one->framing == BY_LENGTH) one->left = strtoul(length, NULL, 10);
    statuses[one->status]++;
    *rest_count = one->head.used - (size_t)(end + 4 - one->head.bytes);
    return end + 4;
}

static void take(struct client *one, const char *bytes, size_t count) {
    if (one->framing == BY_HEAD) {
        buffer_add(&one->head, bytes, count + 1); /* and a byte that is none of its own, for the NUL below */
        one->head.used--;
        one->head.bytes[one->head.used] = 0;
        bytes = take_head(one, &count);
        if (!bytes) return;
    }
    if (one->framing == BY_CHUNKS) {
        if (!take_chunks(one, bytes, count)) failed(one, MALFORMED, "a malformed chunk");
        else if (one->chunk_state == 4) ended(one);
        return;
    }
    take_body(one, bytes, one->framing == BY_LENGTH && count > one->left ? one->left : count);
    if (one->framing == BY_LENGTH && (one->left -= count < one->left ? count : one->left) == 0) ended(one);
}

static void hear(struct client *one, uint32_t events) {
    static char piece[65537];
    if (one->fd < 0) return;
    if (one->state == CONNECTING) {
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(one->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error) {
            failed(one, NO_CONNECTION, strerror(error));
            return;
        }
        one->state = SENDING;
        register_events(one, chosen.slow_bytes ? 0 : EPOLLIN);
        send_request(one);
        if (chosen.slow_bytes && one->state == READING) timer_start(&one->timer, now_ns());
        return;
    }
    if (one->state == SENDING && (events & EPOLLOUT)) {
        send_request(one);
        if (one->state == READING) register_events(one, EPOLLIN);
    }
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)) || one->fd < 0) return;
    ssize_t count = recv(one->fd, piece, chosen.slow_bytes ? chosen.slow_bytes : sizeof piece - 1, 0);
    if (count < 0 && errno == EAGAIN) return;
    if (one->state == RESTING) { /* a server may close what is idle, and say nothing there */
        if (count > 0) failed(one, MALFORMED, "bytes between two answers");
        else hang_up(one);
    } else if (count <= 0) {
        broke(one, count ? strerror(errno) : "the server closed the connection");
    } else {
        take(one, piece, (size_t)count);
    }
}

static void wake(struct client *one) {
    if (one->state == RESTING) {
        begin(one);
    } else if (one->leaves) {
        left_count++;
        one->closes = true;
        rest(one);
    } else { /* it reads slowly */
        hear(one, EPOLLIN);
        if (one->state == READING && !one->timer.place) timer_start(&one->timer, now_ns() + (uint64_t)(chosen.slow_ms * 1e6));
    }
}

/* --- what is asked for, and what is told ----------------------------------------------------------------------- */

static void read_keys(const char *file) {
    FILE *lines = fopen(file, "r");
    char line[512];
    if (!lines) die("%s: %s", file, strerror(errno));
    while (fgets(line, sizeof line, lines)) {
        line[strcspn(line, "\n")] = 0;
        keys = grown(keys, sizeof *keys * (key_count + 1));
        keys[key_count++] = strdup(line);
    }
    fclose(lines);
}

static void write_request(struct client *one) {
    char head[2048], body[2048];
    int length = snprintf(body, sizeof body,
                          "{\"model\":\"%s\",%s%s\"max_tokens\":%d,\"messages\":[{\"role\":\"user\",\"content\":\"pace=%s ",
                          chosen.model, chosen.streams ? "\"stream\":true," : "",
                          chosen.usage ? "\"stream_options\":{\"include_usage\":true}," : "", chosen.chunks, chosen.pace);
    const char *ending = "\"}]}";
    size_t whole = (size_t)length + (size_t)chosen.padding + strlen(ending);
    char authorization[600] = "";
    if (key_count)
        snprintf(authorization, sizeof authorization, "authorization: Bearer %s\r\n", keys[(size_t)one->number % key_count]);
    int head_length = snprintf(head, sizeof head,
                               "POST %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\naccept: application/json\r\n"
                               "user-agent: OpenAI/Python 2.0.0\r\n%scontent-type: application/json\r\n"
                               "content-length: %zu\r\n\r\n",
                               chosen.path, chosen.ports[one->number % chosen.port_count], authorization, whole);
    buffer_add(&one->request, head, (size_t)head_length);
    buffer_add(&one->request, body, (size_t)length);
    for (int i = 0; i < chosen.padding; i++) buffer_add(&one->request, &"What is the answer to all questions? "[i % 37], 1);
    buffer_add(&one->request, ending, strlen(ending));
}

static int by_size(const void *left, const void *right) {
    float a = *(const float *)left, b = *(const float *)right;
    return (a > b) - (a < b);
}

static void tell(const char *name, struct samples *samples) {
    static const double shares[] = {0.5, 0.9, 0.99, 1};
    static const char *const names[] = {"p50", "p90", "p99", "max"};
    qsort(samples->ms, samples->used, sizeof *samples->ms, by_size);
    printf(",\"%s_ms\":{", name);
    for (int i = 0; i < 4 && samples->used; i++) {
        size_t rank = (size_t)ceil(shares[i] * (double)samples->used);
        printf("%s\"%s\":%.4f", i ? "," : "", names[i], (double)samples->ms[rank ? rank - 1 : 0]);
    }
    printf("}");
}

static void report(double seconds) {
    uint64_t bad = 0;
    for (int i = 0; i < FAULTS; i++) bad += faults[i];
    printf("{\"good\":%lu,\"errors\":%lu,\"left\":%lu,\"sent_again\":%lu,\"seconds\":%.4f,\"faults\":{", good, bad, left_count,
           again_count, seconds);
    const char *comma = "";
    for (int i = 0; i < FAULTS; i++)
        if (faults[i]) printf("%s\"%s\":%lu", comma, FAULT_NAMES[i], faults[i]), comma = ",";
    printf("},\"statuses\":{");
    comma = "";
    for (int i = 0; i < 600; i++)
        if (statuses[i]) printf("%s\"%d\":%lu", comma, i, statuses[i]), comma = ",";
    printf("},\"first_fault\":\"%s\"", first_fault);
    tell("ttft", &ttft);
    tell("e2e", &e2e);
    puts("}");
}

enum { PORTS, CONNECTIONS, REQUESTS, SECONDS, RAMP, STREAM, PACE, KEYS, MODEL, PATH, FRESH, SOURCES, LEAVE, SLOWLY, EXPECT,
       TIMEOUT, LOOSE, USAGE, BEGAN, PADDING, PAUSE };
static const struct option OPTIONS[] = {
    {"ports", 1, 0, PORTS}, {"connections", 1, 0, CONNECTIONS}, {"requests", 1, 0, REQUESTS}, {"seconds", 1, 0, SECONDS},
    {"ramp-ms", 1, 0, RAMP}, {"stream", 0, 0, STREAM}, {"pace", 1, 0, PACE}, {"keys", 1, 0, KEYS}, {"model", 1, 0, MODEL},
    {"path", 1, 0, PATH}, {"fresh", 0, 0, FRESH}, {"sources", 1, 0, SOURCES}, {"leave-ms", 1, 0, LEAVE},
    {"slowly", 1, 0, SLOWLY}, {"expect", 1, 0, EXPECT}, {"timeout-seconds", 1, 0, TIMEOUT}, {"loose", 0, 0, LOOSE},
    {"include-usage", 0, 0, USAGE}, {"tell-began", 0, 0, BEGAN}, {"padding", 1, 0, PADDING},
    {"pause-ms", 1, 0, PAUSE}, {0}};

static void choose(int count, char **words) {
    for (int option; (option = getopt_long(count, words, "", OPTIONS, NULL)) != -1;) {
        switch (option) {
        case PORTS:
            for (char *word = strtok(optarg, ","); word && chosen.port_count < 16; word = strtok(NULL, ","))
                chosen.ports[chosen.port_count++] = atoi(word);
            break;
        case CONNECTIONS: chosen.connections = atoi(optarg); break;
        case REQUESTS: chosen.requests = atoi(optarg); break;
        case SECONDS: chosen.seconds = atof(optarg); break;
        case RAMP: chosen.ramp_ms = atof(optarg); break;
        case STREAM: chosen.streams = true; break;
        case PACE: chosen.pace = optarg; break;
        case KEYS: read_keys(optarg); break;
        case MODEL: chosen.model = optarg; break;
        case PATH: chosen.path = optarg; break;
        case FRESH: chosen.fresh = true; break;
        case SOURCES: chosen.sources = atoi(optarg); break;
        case LEAVE: chosen.leave_ms = atof(optarg); break;
        case SLOWLY:
            if (sscanf(optarg, "%zu:%lf", &chosen.slow_bytes, &chosen.slow_ms) != 2) die("--slowly BYTES:MILLISECONDS");
            break;
        case EXPECT: chosen.expected = atoi(optarg); break;
        case TIMEOUT: chosen.timeout_seconds = atof(optarg); break;
        case LOOSE: chosen.loose = true; break;
        case USAGE: chosen.usage = true; break;
        case BEGAN: chosen.tells_began = true; break;
        case PAUSE: chosen.pause_ms = atof(optarg); break;
        case PADDING: chosen.padding = atoi(optarg); break;
        default: exit(2);
        }
    }
    if (!chosen.port_count || optind < count) die("load --ports PORT,... [options]; see the head of load.c");
    if (!chosen.requests && chosen.seconds <= 0) die("--requests or --seconds is needed");
    if (sscanf(chosen.pace, "%*f:%*f:%d", &chosen.chunks) != 1) die("--pace FIRST:INTERVAL:CHUNKS");
}

int main(int count, char **words) {
    static struct epoll_event events[1024];
    prepare_process();
    choose(count, words);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    struct client *clients = grown(NULL, sizeof *clients * (size_t)chosen.connections);
    memset(clients, 0, sizeof *clients * (size_t)chosen.connections);
    for (int i = 0; i < chosen.connections; i++) {
        clients[i].fd = -1;
        clients[i].number = i;
        clients[i].limit.is_limit = true;
        write_request(&clients[i]);
    }
    started_at = now_ns();
    if (chosen.seconds > 0) deadline = started_at + (uint64_t)(chosen.seconds * 1e9);
    for (int i = 0; i < chosen.connections; i++)
        timer_start(&clients[i].timer, started_at + (uint64_t)(chosen.ramp_ms * 1e6 * random_share()));
    active = chosen.connections;
    while (active) {
        int ready = wait_for_events(epoll, events, 1024);
        for (int i = 0; i < ready; i++) hear(events[i].data.ptr, events[i].events);
        uint64_t now = now_ns();
        for (struct timer *timer; (timer = timer_due(now));) {
            if (timer->is_limit) failed((struct client *)((char *)timer - offsetof(struct client, limit)), TIMED_OUT, "too late");
            else wake((struct client *)timer);
        }
    }
    report((double)(now_ns() - started_at) / 1e9);
    return 0;
}
