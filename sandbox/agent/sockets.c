#include "sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "connection.h"
#include "container.h"
#include "credentials.h"
#include "guest.h"
#include "reply.h"
#include "scope.h"

enum { ACCEPTS_MAX = 1024, LISTENERS_MAX = 1024, BACKLOG = 4096, MODE_MASK = 0777 };

struct listener {
    struct listener *next;
    struct source source;
    Husk__Guest__V1__HostSocket__Kind kind;
    bool ready;
    char path[sizeof GUEST_SOCKETS + 128];
};

struct accept {
    struct accept *next;
    uint32_t request, to_guest, from_guest, window;
};

// ------------------------------------------------------------------------------------ sockets

static const char *name_of(const struct listener *listener) {
    return listener->path + sizeof GUEST_SOCKETS;
}

static struct listener **find(struct agent *agent, const char *name) {
    struct listener **link = &agent->listeners;
    while (*link && strcmp(name_of(*link), name) != 0)
        link = &(*link)->next;
    return link;
}

static void remove_listener(struct agent *agent, struct listener **link) {
    struct listener *listener = *link;
    for (struct connection *connection = agent->connections; connection; connection = connection->next)
        if (connection->listener == listener)
            output_stream_end(&connection->output, agent);
    *link = listener->next;
    loop_close(&agent->loop, &listener->source);
    unlink(listener->path);
    free(listener);
}

static void listener_ready(struct source *source, uint32_t events) {
    (void)events;
    container_of(source, struct listener, source)->ready = true;
}

static int socket_type(Husk__Guest__V1__HostSocket__Kind kind) {
    switch (kind) {
    case HUSK__GUEST__V1__HOST_SOCKET__KIND__SEQPACKET:
        return SOCK_SEQPACKET;
    case HUSK__GUEST__V1__HOST_SOCKET__KIND__DATAGRAM:
        return SOCK_DGRAM;
    default:
        return SOCK_STREAM;
    }
}

static int open_socket(struct listener *listener, struct error *error) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int on = 1, type = socket_type(listener->kind);
    if (strlen(listener->path) >= sizeof address.sun_path)
        return fail_about(error, ENAMETOOLONG, "socket", listener->path);
    memcpy(address.sun_path, listener->path, strlen(listener->path) + 1);
    autoclose int fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    unlink(listener->path);
    // it has its mode before a container can connect
    if (fd < 0 || fchmod(fd, 0600) < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return fail_about(error, errno, "socket", listener->path);
    if (type == SOCK_DGRAM ? setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0
                           : listen(fd, BACKLOG) < 0)
        return fail_about(error, errno, "socket", listener->path);
    listener->source.fd = take_fd(&fd);
    return 0;
}

static int set_attributes(const char *path, const HostSocket *wanted, struct error *error) {
    if (chown(path, wanted->uid, wanted->gid) < 0 || chmod(path, wanted->mode & MODE_MASK) < 0)
        return fail_about(error, errno, "socket", path);
    return 0;
}

static int listen_on(struct agent *agent, const HostSocket *wanted, struct error *error) {
    struct listener **link = find(agent, wanted->name);
    if (*link && (*link)->kind != wanted->kind)
        remove_listener(agent, link);
    if (*find(agent, wanted->name))
        return set_attributes((*find(agent, wanted->name))->path, wanted, error);
    struct listener *listener = memory_get(sizeof *listener);
    listener->kind = wanted->kind;
    listener->source = (struct source){.fd = -1, .ready = listener_ready};
    snprintf(listener->path, sizeof listener->path, "%s/%s", GUEST_SOCKETS, wanted->name);
    if (open_socket(listener, error) < 0 || set_attributes(listener->path, wanted, error) < 0) {
        close_fd(&listener->source.fd);
        unlink(listener->path);
        free(listener);
        return -1;
    }
    loop_add(&agent->loop, &listener->source, EPOLLIN);
    listener->next = agent->listeners;
    agent->listeners = listener;
    return 0;
}

int sockets_listen(struct agent *agent, const ListenSockets *request, struct error *error) {
    int count = 0;
    for (const struct listener *listener = agent->listeners; listener; listener = listener->next)
        count++;
    if (agent->test && geteuid() != 0)
        return fail(error, EPERM, "socket"); // there are no namespaces to do it in
    if (request->n_sockets > (size_t)(LISTENERS_MAX - count))
        return fail_about(error, EMFILE, "socket", "too many sockets of the host");
    for (size_t i = 0; i < request->n_sockets; i++)
        if (!is_id(request->sockets[i]->name))
            return fail_about(error, EINVAL, "socket", "name");
    if (mkdir(GUEST_SOCKETS, 0700) < 0 && errno != EEXIST)
        return fail(error, errno, "socket");
    for (size_t i = 0; i < request->n_sockets; i++)
        if (listen_on(agent, request->sockets[i], error) < 0)
            return -1;
    return 0;
}

int sockets_keep(struct agent *agent, const KeepSockets *request) {
    for (struct listener **link = &agent->listeners; *link;) {
        bool kept = false;
        for (size_t i = 0; i < request->n_names && !kept; i++)
            kept = !strcmp(request->names[i], name_of(*link));
        if (kept)
            link = &(*link)->next;
        else
            remove_listener(agent, link);
    }
    return 0;
}

// ----------------------------------------------------------------------------------- requests

void sockets_accept(struct agent *agent, uint32_t request, const AcceptSocket *message) {
    struct error error = {0};
    int waiting = 0;
    for (const struct accept *accept = agent->accepts; accept; accept = accept->next)
        waiting++;
    bool valid = message->to_guest_stream && message->from_guest_stream;
    if (!valid || waiting >= ACCEPTS_MAX) {
        fail_about(&error, valid ? EMFILE : EINVAL, "accept", valid ? "too many requests" : "streams");
        reply_failure(agent, request, &error);
        return;
    }
    struct accept *accept = memory_get(sizeof *accept);
    *accept = (struct accept){
        .next = agent->accepts,
        .request = request,
        .to_guest = message->to_guest_stream,
        .from_guest = message->from_guest_stream,
        .window = message->window,
    };
    agent->accepts = accept;
}

// Ends the streams too: the host waits for that.
static void cancel(struct agent *agent, struct accept **link) {
    struct accept *accept = *link;
    struct error error = {0};
    fail_about(&error, ECANCELED, "accept", "by the host");
    reply_failure(agent, accept->request, &error);
    channel_send(&agent->channel, FRAME_CLOSE, accept->from_guest, NULL, 0);
    *link = accept->next;
    free(accept);
}

int sockets_frame(struct agent *agent, const struct frame *frame) {
    for (struct accept **link = &agent->accepts; *link; link = &(*link)->next) {
        struct accept *accept = *link;
        if (frame->stream == accept->to_guest) // there is no credit yet
            return frame->kind == FRAME_DATA ? FRAME_INVALID : FRAME_HANDLED;
        if (frame->stream != accept->from_guest)
            continue;
        if (frame->kind == FRAME_WINDOW)
            accept->window += read_u32(frame->payload);
        if (frame->kind == FRAME_RESET)
            cancel(agent, link);
        return FRAME_HANDLED;
    }
    return 0;
}

void sockets_disconnect(struct agent *agent) {
    for (struct accept *accept = agent->accepts, *next; accept; accept = next) {
        next = accept->next;
        free(accept);
    }
    agent->accepts = NULL;
}

// ---------------------------------------------------------------------------------- accepting

// Whether a connection takes the messages of this listener already.
static bool is_read(const struct agent *agent, const struct listener *listener) {
    for (const struct connection *connection = agent->connections; connection; connection = connection->next)
        if (connection->listener == listener && connection->output.source.fd >= 0)
            return true;
    return false;
}

// Returns a descriptor of a connection, or of the socket itself where it has messages to be read; -1: there
// is none now.
static int next_peer(struct agent *agent, struct listener *listener, struct credentials *peer) {
    if (listener->kind != HUSK__GUEST__V1__HOST_SOCKET__KIND__DATAGRAM) {
        int fd = accept4(listener->source.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0 && !credentials_of_peer(fd, peer))
            close_fd(&fd);
        return fd;
    }
    if (is_read(agent, listener)) {
        errno = EBUSY;
        return -1;
    }
    *peer = (struct credentials){0};
    if (!credentials_of_message(listener->source.fd, &peer->uid, &peer->gid)) {
        errno = EAGAIN;
        return -1;
    }
    return fcntl(listener->source.fd, F_DUPFD_CLOEXEC, 3);
}

static void reply_accepted(struct agent *agent, uint32_t request, const struct listener *listener,
                           struct credentials *peer) {
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    SocketAccepted accepted = HUSK__GUEST__V1__SOCKET_ACCEPTED__INIT;
    accepted.name = (char *)name_of(listener);
    accepted.uid = peer->uid;
    accepted.gid = peer->gid;
    accepted.groups = peer->groups;
    accepted.n_groups = peer->group_count;
    reply.body_case = HUSK__GUEST__V1__REPLY__BODY_ACCEPTED;
    reply.accepted = &accepted;
    reply_send(agent, request, &reply);
}

// Gives the oldest request the next connection of a listener. Returns whether there was one.
static bool accept_one(struct agent *agent, struct listener *listener) {
    struct credentials peer;
    struct error error = {0};
    int fd = next_peer(agent, listener, &peer);
    if (fd < 0) {
        listener->ready = errno != EAGAIN;
        return false;
    }
    struct accept **link = &agent->accepts;
    while ((*link)->next)
        link = &(*link)->next;
    struct accept *accept = *link;
    struct connection *connection =
        connection_open(agent, fd, accept->to_guest, accept->from_guest, accept->window, &error);
    if (!connection)
        return false;
    reply_accepted(agent, accept->request, listener, &peer);
    *link = NULL;
    free(accept);
    connection->output.no_descriptors = true;
    connection->messages = listener->kind != HUSK__GUEST__V1__HOST_SOCKET__KIND__STREAM;
    if (listener->kind == HUSK__GUEST__V1__HOST_SOCKET__KIND__DATAGRAM) {
        connection->listener = listener;
        connection->uid = peer.uid;
        connection->gid = peer.gid;
    }
    connection_begin(connection);
    return true;
}

void sockets_pump(struct agent *agent) {
    for (bool more = true; more && agent->accepts;) { // the listeners in turn
        more = false;
        for (struct listener *listener = agent->listeners; listener && agent->accepts;
             listener = listener->next)
            if (listener->ready)
                more |= accept_one(agent, listener);
    }
}
