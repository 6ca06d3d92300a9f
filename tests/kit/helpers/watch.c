// watch PATH: prints "ready", then one line for each inotify event of PATH: the
// names of its bits, and the file's name.
#include <stdio.h>
#include <sys/inotify.h>
#include <unistd.h>

static const struct {
    unsigned bit;
    const char *name;
} names[] = {
    {IN_CREATE, "CREATE"},     {IN_DELETE, "DELETE"},           {IN_MODIFY, "MODIFY"},
    {IN_ATTRIB, "ATTRIB"},     {IN_CLOSE_WRITE, "CLOSE_WRITE"}, {IN_MOVED_FROM, "MOVED_FROM"},
    {IN_MOVED_TO, "MOVED_TO"},
};

int main(int argc, char **argv) {
    _Alignas(struct inotify_event) char buffer[65536];
    unsigned mask = 0;
    for (unsigned i = 0; i < sizeof names / sizeof names[0]; i++)
        mask |= names[i].bit;
    int queue = inotify_init();
    if (argc != 2 || inotify_add_watch(queue, argv[1], mask) < 0)
        return 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    for (ssize_t length; (length = read(queue, buffer, sizeof buffer)) > 0;)
        for (char *at = buffer; at < buffer + length;) {
            struct inotify_event *event = (struct inotify_event *)at;
            for (unsigned i = 0; i < sizeof names / sizeof names[0]; i++)
                if (event->mask & names[i].bit)
                    printf("%s %s\n", names[i].name, event->len ? event->name : "-");
            at += sizeof *event + event->len;
        }
    return 1;
}
