/* An upstream that answers as vLLM does, without a model, and costs little: the benchmark's other end.
 *
 *     upstream PORT...        listens on each, on every address of 127/8; ends with SIGTERM
 *
 * What it shall do is said in the prompt, which is what every proxy passes on: "pace=FIRST:INTERVAL:CHUNKS", times in
 * milliseconds; interval 0: all at once. Without it: one chunk at once.
 * With "stream":true the answer is a stream of server-sent events: the head at once, then one event per HTTP chunk and
 * per write, as uvicorn sends them, a usage event if "include_usage":true, and [DONE]. Otherwise it is one JSON object of
 * about 1 kB after FIRST.
 *
 * "pace=...:FAULT" orders a fault: e (status 500), i (a stream of 200 that begins with an error), b (closes in the middle
 * of the answer), r (closes without an answer).
 *
 * A connection on which nothing was asked for five seconds is closed, as uvicorn does.
 *
 * GET /stats tells as JSON: connections open now, answers under way, requests so far, and how many answers' readers left
 * before the end. GET /close-idle closes every connection without a request. Any other GET is answered by a list of models, so that probes find what they look for.
 */
#include "loop.h"

struct connection {
    struct timer timer; /* first: a timer is its connection */
    struct connection *next, *previous;
    int fd;
    bool is_listening, is_answering, is_stream, wants_usage, wants_close, waits_for_room;
    char fault;
    uint32_t sent, chunks;
    uint64_t interval_ns;
    size_t head_end, body_end; /* of the request that is being answered, in `in` */
    struct buffer in, out;
};

#define IDLE_NS 5000000000u

static const char STREAM_HEAD[] = "HTTP/1.1 200 OK\r\ndate: Tue, 01 Dec 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
                                  "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char CHUNK[] =
    "data: {\"id\":\"chatcmpl-7d1f6ac2be0f4b0f9b0c6a7e2f9d8c31\",\"object\":\"chat.completion.chunk\",\"created\":1796119200,"
    "\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"logprobs\":null,"
    "\"finish_reason\":null,\"token_ids\":null}]}\n\n";
static const char USAGE[] =
    "data: {\"id\":\"chatcmpl-7d1f6ac2be0f4b0f9b0c6a7e2f9d8c31\",\"object\":\"chat.completion.chunk\",\"created\":1796119200,"
    "\"model\":\"bench\",\"choices\":[],\"usage\":{\"prompt_tokens\":100,\"total_tokens\":132,\"completion_tokens\":32,"
    "\"prompt_tokens_details\":{\"cached_tokens\":64}}}\n\n";
static const char STREAM_ERROR[] =
    "data: {\"error\":{\"message\":\"EngineCore encountered an issue\",\"type\":\"InternalServerError\",\"param\":null,"
    "\"code\":500}}\n\n";
static const char PLAIN_ERROR[] =
    "{\"error\":{\"message\":\"EngineCore encountered an issue\",\"type\":\"InternalServerError\",\"param\":null,\"code\":500}}";
static const char HALF_ANSWER[] =
    "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\ncontent-type: application/json\r\n\r\n{\"id\":\"chatcmpl-7d1f";
static const char MODELS[] = "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"created\":1796119200,"
                             "\"owned_by\":\"vllm\",\"root\":\"bench\",\"parent\":null,\"max_model_len\":32768}]}";
static const char DONE[] = "data: [DONE]\n\n";

static char plain_answer[2048], framed_chunk[512];
static size_t framed_chunk_length;
static int epoll;
static struct connection *listening[64], *first;
static int listening_count;
static bool accepting_rests;
static uint64_t open_count, answering_count, request_count, left_count;

static void make_answers(void) {
    char text[700];
    for (size_t i = 0; i < sizeof text - 1; i++) text[i] = " the answer to all questions is"[i % 31];
    text[sizeof text - 1] = 0;
    snprintf(plain_answer, sizeof plain_answer,
             "{\"id\":\"chatcmpl-7d1f6ac2be0f4b0f9b0c6a7e2f9d8c31\",\"object\":\"chat.completion\",\"created\":1796119200,"
             "\"model\":\"bench\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"%s\"},"
             "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":100,\"total_tokens\":132,"
             "\"completion_tokens\":32,\"prompt_tokens_details\":{\"cached_tokens\":64}}}",
             text);
    framed_chunk_length = (size_t)snprintf(framed_chunk, sizeof framed_chunk, "%zx\r\n%s\r\n", sizeof CHUNK - 1, CHUNK);
}

static void hang_up(struct connection *one) {
    if (one->is_answering) {
        left_count++;
        answering_count--;
    }
    open_count--;
    if (one->next) one->next->previous = one->previous;
    if (one->previous) one->previous->next = one->next;
    else first = one->next;
    timer_stop(&one->timer);
    close(one->fd);
    buffer_free(&one->in);
    buffer_free(&one->out);
    free(one);
    if (accepting_rests) {
        accepting_rests = false;
        for (int i = 0; i < listening_count; i++)
            watch(epoll, EPOLL_CTL_MOD, listening[i]->fd, EPOLLIN, listening[i]);
    }
}

/* False: the connection is gone. */
static bool flush(struct connection *one) {
    while (one->out.used) {
        ssize_t count = send(one->fd, one->out.bytes, one->out.used, MSG_NOSIGNAL);
        if (count < 0 && errno == EAGAIN) break;
        if (count <= 0) {
            hang_up(one);
            return false;
        }
        buffer_drop(&one->out, (size_t)count);
    }
    if (!one->out.used) buffer_free(&one->out);
    bool waits = one->out.used > 0;
    if (waits != one->waits_for_room) {
        one->waits_for_room = waits;
        watch(epoll, EPOLL_CTL_MOD, one->fd, EPOLLIN | EPOLLRDHUP | (waits ? EPOLLOUT : 0), one);
    }
    return true;
}

/* False: the connection is gone. */
static bool say(struct connection *one, const char *bytes, size_t count) {
    if (!one->out.used) {
        ssize_t sent = send(one->fd, bytes, count, MSG_NOSIGNAL);
        if (sent == (ssize_t)count) return true;
        if (sent < 0 && errno != EAGAIN) {
            hang_up(one);
            return false;
        }
        if (sent > 0) bytes += sent, count -= (size_t)sent;
    }
    buffer_add(&one->out, bytes, count);
    return flush(one);
}

static bool say_event(struct connection *one, const char *event, size_t count) {
    char framed[1024];
    return say(one, framed, (size_t)snprintf(framed, sizeof framed, "%zx\r\n%.*s\r\n", count, (int)count, event));
}

static bool say_json(struct connection *one, const char *status, const char *body) {
    char answer[4096];
    return say(one, answer, (size_t)snprintf(answer, sizeof answer,
                                             "HTTP/1.1 %s\r\ndate: Tue, 01 Dec 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
                                             "content-length: %zu\r\ncontent-type: application/json\r\n\r\n%s",
                                             status, strlen(body), body));
}

static bool take_request(struct connection *one);

/* The answer has been said; what came after its request is the next one. False: the connection is gone. */
static bool answered(struct connection *one) {
    one->is_answering = false;
    answering_count--;
    if (one->wants_close && !one->out.used) {
        hang_up(one);
        return false;
    }
    if (!take_request(one)) return false;
    if (!one->is_answering) timer_start(&one->timer, now_ns() + IDLE_NS);
    return true;
}

/* A fault that was ordered. */
static bool break_off(struct connection *one) {
    one->is_answering = false;
    answering_count--;
    hang_up(one);
    return false;
}

/* Says what is due. False: the connection is gone. */
static bool go_on(struct connection *one) {
    if (!one->is_answering) { /* what was due is a request */
        hang_up(one);
        return false;
    }
    if (one->fault == 'r') return break_off(one);
    if (!one->is_stream || one->fault == 'e') {
        if (one->fault == 'b') {
            return say(one, HALF_ANSWER, sizeof HALF_ANSWER - 1) && break_off(one);
        }
        bool is_error = one->fault != 0;
        if (!say_json(one, is_error ? "500 Internal Server Error" : "200 OK", is_error ? PLAIN_ERROR : plain_answer))
            return false;
        return answered(one);
    }
    if (one->fault == 'i') {
        return say_event(one, STREAM_ERROR, sizeof STREAM_ERROR - 1) && say_event(one, DONE, sizeof DONE - 1) &&
               say(one, "0\r\n\r\n", 5) && answered(one);
    }
    do {
        if (one->fault == 'b' && one->sent == one->chunks / 2) return break_off(one);
        if (!say(one, framed_chunk, framed_chunk_length)) return false;
        one->sent++;
    } while (!one->interval_ns && one->sent < one->chunks);
    if (one->sent < one->chunks) {
        timer_start(&one->timer, one->timer.at_ns + one->interval_ns);
        return true;
    }
    if (one->wants_usage && !say_event(one, USAGE, sizeof USAGE - 1)) return false;
    return say_event(one, DONE, sizeof DONE - 1) && say(one, "0\r\n\r\n", 5) && answered(one);
}

static bool tell(struct connection *one) {
    char stats[256];
    one->is_answering = true;
    answering_count++;
    snprintf(stats, sizeof stats, "{\"open\":%lu,\"answering\":%lu,\"requests\":%lu,\"left\":%lu}", open_count,
             answering_count - 1, request_count, left_count);
    if (!strncmp(one->in.bytes, "GET /close-idle", 15)) {
        for (struct connection *other = first, *next; other; other = next) {
            next = other->next;
            if (other != one && !other->is_answering && !other->in.used) hang_up(other);
        }
    }
    bool is_stats = !strncmp(one->in.bytes, "GET /stats", 10);
    size_t end = one->body_end;
    bool is_there = say_json(one, "200 OK", is_stats ? stats : MODELS);
    if (!is_there) return false;
    buffer_drop(&one->in, end);
    return answered(one);
}

/* Begins to answer the next request if all of it is there. False: the connection is gone. */
static bool take_request(struct connection *one) {
    char *end = one->in.used ? memmem(one->in.bytes, one->in.used, "\r\n\r\n", 4) : NULL;
    if (!end) {
        if (!one->in.used) buffer_free(&one->in);
        return true;
    }
    char kept = end[3];
    end[3] = 0; /* so that the head is a string */
    const char *length = header_of(one->in.bytes, "content-length"), *connection = header_of(one->in.bytes, "connection");
    bool is_chunked = header_of(one->in.bytes, "transfer-encoding") != NULL;
    size_t body = length ? strtoul(length, NULL, 10) : 0;
    one->wants_close = connection && !strncasecmp(connection, "close", 5);
    end[3] = kept;
    one->head_end = (size_t)(end - one->in.bytes) + 4;
    one->body_end = one->head_end + body;
    if (is_chunked) {
        if (say_json(one, "411 Length Required", "{}")) hang_up(one);
        return false;
    }
    if (one->in.used < one->body_end) return true;
    if (!strncmp(one->in.bytes, "GET ", 4)) return tell(one);
    request_count++;
    answering_count++;
    one->is_answering = true;
    const char *text = one->in.bytes + one->head_end;
    const char *pace = memmem(text, body, "pace=", 5);
    double first = 0, interval = 0;
    one->chunks = 1;
    one->sent = 0;
    one->fault = 0;
    if (pace && sscanf(pace, "pace=%lf:%lf:%u:%c", &first, &interval, &one->chunks, &one->fault) < 3)
        die("cannot read: %.40s", pace);
    one->interval_ns = (uint64_t)(interval * 1e6);
    one->is_stream = memmem(text, body, "\"stream\":true", 13) || memmem(text, body, "\"stream\": true", 14);
    one->wants_usage = memmem(text, body, "\"include_usage\":true", 20) || memmem(text, body, "\"include_usage\": true", 21);
    buffer_drop(&one->in, one->body_end);
    if (!one->in.used) buffer_free(&one->in);
    if (one->is_stream && one->fault != 'e' && one->fault != 'r' && !say(one, STREAM_HEAD, sizeof STREAM_HEAD - 1))
        return false;
    timer_stop(&one->timer);
    one->timer.at_ns = now_ns() + (uint64_t)(first * 1e6);
    if (first > 0) {
        timer_start(&one->timer, one->timer.at_ns);
        return true;
    }
    return go_on(one);
}

static void hear(struct connection *one, uint32_t events) {
    static char piece[65536];
    if ((events & EPOLLOUT) && !flush(one)) return;
    if (one->wants_close && !one->is_answering && !one->out.used) {
        hang_up(one);
        return;
    }
    if (!(events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))) return;
    ssize_t count = recv(one->fd, piece, sizeof piece, 0);
    if (count < 0 && errno == EAGAIN) return;
    if (count <= 0) {
        hang_up(one);
        return;
    }
    buffer_add(&one->in, piece, (size_t)count);
    if (!one->is_answering) take_request(one);
}

static void take_connections(struct connection *listener) {
    for (;;) {
        int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EMFILE) { /* until one hangs up */
                accepting_rests = true;
                for (int i = 0; i < listening_count; i++) watch(epoll, EPOLL_CTL_MOD, listening[i]->fd, 0, listening[i]);
            }
            return;
        }
        without_delay(fd);
        struct connection *one = grown(NULL, sizeof *one);
        memset(one, 0, sizeof *one);
        one->fd = fd;
        open_count++;
        one->next = first;
        if (first) first->previous = one;
        first = one;
        watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN | EPOLLRDHUP, one);
    }
}

static void listen_on(int port) {
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP);
    struct sockaddr_in address = address_of(INADDR_LOOPBACK, port);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 8192) < 0)
        die("cannot listen on port %d: %s", port, strerror(errno));
    struct connection *one = listening[listening_count++] = grown(NULL, sizeof *one);
    memset(one, 0, sizeof *one);
    one->is_listening = true;
    one->fd = fd;
    watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN, one);
}

int main(int count, char **words) {
    static struct epoll_event events[1024];
    if (count < 2 || count > 64) die("usage: upstream PORT...");
    prepare_process();
    make_answers();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 1; i < count; i++) listen_on(atoi(words[i]));
    puts("listening");
    fflush(stdout);
    for (;;) {
        int ready = wait_for_events(epoll, events, 1024);
        for (int i = 0; i < ready; i++) {
            struct connection *one = events[i].data.ptr;
            if (one->is_listening) take_connections(one);
            else hear(one, events[i].events);
        }
        uint64_t now = now_ns();
        for (struct timer *timer; (timer = timer_due(now));) go_on((struct connection *)timer);
    }
}
