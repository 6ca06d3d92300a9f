/* Two processes that meet in files, to see whether they have one file system.

     meet serve DIR    make files and hold locks in DIR, and answer `meet check`; does not end
     meet check DIR     print a line for each way of meeting that works
     meet hold FILE    hold locks on a file and write to it by a shared mapping; does not end
     meet try FILE     print a line for each of these that is seen
     meet append FILE TAG COUNT    append so many lines of different lengths
*/
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { STEP_MS = 2, LIMIT_MS = 3000, PAGE = 4096 };

static void in(const char *directory) {
    if (chdir(directory) < 0)
        err(1, "%s", directory);
}

static void write_file(const char *name, const char *text) {
    int file = open(name, O_CREAT | O_TRUNC | O_WRONLY, 0644);
    if (file < 0 || write(file, text, strlen(text)) < 0)
        err(1, "%s", name);
    close(file);
}

static struct sockaddr_un address(void) {
    struct sockaddr_un found = {.sun_family = AF_UNIX};
    strcpy(found.sun_path, "socket");
    return found;
}

/* ---------------------------------------------------------------------------------- locks and memory */

static volatile char *hold_file(const char *name) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int file = open(name, O_CREAT | O_RDWR, 0666), other = open(name, O_RDWR);
    if (file < 0 || other < 0 || ftruncate(file, PAGE) < 0)
        err(1, "%s", name);
    if (flock(file, LOCK_EX | LOCK_NB) < 0 || fcntl(other, F_SETLK, &lock) < 0)
        err(1, "lock %s", name);
    volatile char *map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED)
        err(1, "mmap %s", name);
    return map;
}

static void try_file(const char *name) {
    struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET};
    int file = open(name, O_RDONLY);
    if (file < 0)
        err(1, "%s", name);
    if (flock(file, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK)
        puts("flock");
    if (fcntl(file, F_SETLK, &lock) < 0 && (errno == EAGAIN || errno == EACCES))
        puts("fcntl");
    volatile char *map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, file, 0);
    if (map == MAP_FAILED)
        err(1, "mmap %s", name);
    char before = map[0];
    for (int i = 0; i < LIMIT_MS / STEP_MS; i++) {
        if (map[0] != before) {
            puts("map");
            break;
        }
        poll(NULL, 0, STEP_MS);
    }
}

static void hold(const char *name) {
    volatile char *map = hold_file(name);
    for (;; poll(NULL, 0, STEP_MS))
        map[0]++;
}

/* -------------------------------------------------------------------------------------- a directory */

static void write_fifo(void) {
    for (;;) {
        int fifo = open("fifo", O_WRONLY);
        if (fifo < 0 || write(fifo, "x", 1) < 0)
            err(1, "fifo");
        close(fifo);
        poll(NULL, 0, 50);
    }
}

static void answer(int listener) {
    char word = 0;
    int peer = accept(listener, NULL, NULL);
    while (read(peer, &word, 1) == 1) {
        if (word == 't')
            write_file("touched", "");
        if (word == 'r') {
            write_file("file.new", "new");
            rename("file.new", "file");
        }
        if (write(peer, &word, 1) < 0)
            break;
    }
    close(peer);
}

static void serve(const char *directory) {
    in(directory);
    umask(0);
    const char *names[] = {"socket", "fifo", "ready", "touched"};
    for (int i = 0; i < 4; i++)
        unlink(names[i]);
    write_file("file", "old");
    volatile char *map = hold_file("held");
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un at = address();
    if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) < 0 || listen(listener, 4) < 0)
        err(1, "socket");
    if (mkfifo("fifo", 0666) < 0)
        err(1, "fifo");
    signal(SIGPIPE, SIG_IGN);
    if (fork() == 0)
        write_fifo();
    write_file("ready", "");
    for (struct pollfd waiting = {.fd = listener, .events = POLLIN};; map[0]++)
        if (poll(&waiting, 1, STEP_MS) > 0)
            answer(listener);
}

static int ask(int peer, char word) {
    char said = 0;
    return write(peer, &word, 1) == 1 && read(peer, &said, 1) == 1 && said == word;
}

static void check_by_socket(int peer) {
    char text[8] = "", events[4096];
    int watch = inotify_init1(IN_NONBLOCK), file = open("file", O_RDONLY);
    struct pollfd waiting = {.fd = watch, .events = POLLIN};
    inotify_add_watch(watch, ".", IN_CREATE | IN_MOVED_TO);
    if (file < 0 || read(file, text, sizeof text - 1) < 0)
        err(1, "file");
    close(file);
    if (ask(peer, 'r') && (file = open("file", O_RDONLY)) >= 0 && read(file, text, 3) == 3 &&
        !strcmp(text, "new"))
        puts("rename");
    if (ask(peer, 't') && poll(&waiting, 1, LIMIT_MS) > 0 && read(watch, events, sizeof events) > 0)
        puts("inotify");
}

static void check(const char *directory) {
    in(directory);
    try_file("held");
    char byte;
    int fifo = open("fifo", O_RDONLY | O_NONBLOCK);
    for (int i = 0; fifo >= 0 && i < LIMIT_MS / STEP_MS; i++) {
        if (read(fifo, &byte, 1) == 1) {
            puts("fifo");
            break;
        }
        poll(NULL, 0, STEP_MS);
    }
    int peer = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un at = address();
    if (connect(peer, (struct sockaddr *)&at, sizeof at) == 0) {
        puts("socket");
        check_by_socket(peer);
    }
}

static void append(const char *name, const char *tag, int count) {
    int file = open(name, O_CREAT | O_APPEND | O_WRONLY, 0666);
    char line[256];
    for (int i = 0; i < count; i++) {
        int length = snprintf(line, sizeof line, "%s %d %.*s\n", tag, i, i % 97,
                              "-----------------------------------------------------------"
                              "---------------------------------------");
        if (write(file, line, (size_t)length) != length)
            err(1, "%s", name);
    }
}

int main(int count, char **words) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char *verb = count > 2 ? words[1] : "";
    if (!strcmp(verb, "serve"))
        serve(words[2]);
    else if (!strcmp(verb, "check"))
        check(words[2]);
    else if (!strcmp(verb, "hold"))
        hold(words[2]);
    else if (!strcmp(verb, "try"))
        try_file(words[2]);
    else if (!strcmp(verb, "append") && count > 4)
        append(words[2], words[3], atoi(words[4]));
    else
        errx(2, "usage: meet VERB PATH");
    return 0;
}
