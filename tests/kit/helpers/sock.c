/* A client of Unix sockets.

     sock KIND PATH            copy stdin to the socket, then what it answers to stdout, until its end.
                               KIND: stream; seqpacket and datagram send each line as a message
     sock many PATH COUNT      hold so many connections, and count those that answer what was sent
     sock hold PATH            connect, print "connected", and wait until the other end closes
     sock fill PATH MEBIBYTES  send so many, and print "sent"
     sock sum PATH             read to the end, and print how many bytes came and their sum
     sock serve PATH           send back what each connection sends, one after the other
*/
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int type_of(const char *kind) {
    if (!strcmp(kind, "seqpacket"))
        return SOCK_SEQPACKET;
    return strcmp(kind, "datagram") ? SOCK_STREAM : SOCK_DGRAM;
}

static int connected(const char *path, int type) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    int fd = socket(AF_UNIX, type, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        err(1, "connect");
    return fd;
}

static void copy(const char *path, int type) {
    static char bytes[1 << 17];
    int fd = connected(path, type);
    ssize_t got;
    while (type == SOCK_STREAM ? (got = read(0, bytes, sizeof bytes)) > 0
                               : fgets(bytes, sizeof bytes, stdin) != NULL)
        if (send(fd, bytes, type == SOCK_STREAM ? (size_t)got : strlen(bytes), MSG_NOSIGNAL) < 0)
            err(1, "send");
    if (type == SOCK_DGRAM)
        return;
    shutdown(fd, SHUT_WR);
    while ((got = recv(fd, bytes, sizeof bytes, 0)) > 0)
        if (write(1, bytes, (size_t)got) < 0)
            err(1, "write");
    if (got < 0)
        err(1, "receive");
}

static void many(const char *path, int count) {
    int *fds = calloc((size_t)count, sizeof *fds), answered = 0;
    for (int i = 0; i < count; i++) {
        fds[i] = connected(path, SOCK_STREAM);
        if (write(fds[i], &i, sizeof i) != sizeof i)
            err(1, "write");
    }
    for (int i = 0, number; i < count; i++)
        answered += recv(fds[i], &number, sizeof number, MSG_WAITALL) == sizeof number && number == i;
    printf("%d\n", answered);
}

static void hold(const char *path) {
    char byte;
    int fd = connected(path, SOCK_STREAM);
    puts("connected");
    fflush(stdout);
    ssize_t got = read(fd, &byte, 1);
    printf("%s\n", got == 0 ? "closed" : got > 0 ? "data" : strerror(errno));
}

static void fill(const char *path, long mebibytes) {
    static char bytes[1 << 20];
    int fd = connected(path, SOCK_STREAM);
    for (long i = 0; i < mebibytes; i++)
        for (size_t at = 0; at < sizeof bytes;) {
            ssize_t sent = send(fd, bytes + at, sizeof bytes - at, MSG_NOSIGNAL);
            if (sent < 0)
                err(1, "send");
            at += (size_t)sent;
        }
    puts("sent");
}

static void sum(const char *path) {
    static uint8_t bytes[1 << 16];
    int fd = connected(path, SOCK_STREAM);
    uint64_t count = 0, total = 0;
    ssize_t got;
    while ((got = read(fd, bytes, sizeof bytes)) > 0)
        for (ssize_t i = 0; i < got; i++, count++)
            total += bytes[i];
    printf("%llu %llu\n", (unsigned long long)count, (unsigned long long)total);
}

static void serve(const char *path) {
    static char bytes[1 << 16];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(listener, 8) < 0)
        err(1, "listen");
    for (int fd; (fd = accept(listener, NULL, NULL)) >= 0; close(fd))
        for (ssize_t got; (got = read(fd, bytes, sizeof bytes)) > 0;)
            if (send(fd, bytes, (size_t)got, MSG_NOSIGNAL) < 0)
                break;
}

int main(int argc, char **argv) {
    if (argc < 3)
        errx(2, "see the source");
    if (!strcmp(argv[1], "many") && argc > 3)
        many(argv[2], atoi(argv[3]));
    else if (!strcmp(argv[1], "hold"))
        hold(argv[2]);
    else if (!strcmp(argv[1], "fill") && argc > 3)
        fill(argv[2], atol(argv[3]));
    else if (!strcmp(argv[1], "sum"))
        sum(argv[2]);
    else if (!strcmp(argv[1], "serve"))
        serve(argv[2]);
    else
        copy(argv[2], type_of(argv[1]));
    return 0;
}
