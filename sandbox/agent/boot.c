#include "boot.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h> // in kernels before 6.9 it needs <sys/socket.h> first

#include "agent.h"
#include "cgroup.h"
#include "guest.h"
#include "scope.h"

enum { FILES_MAX = 1024 * 1024, PORT_WAIT_MS = 10000, PORT_STEP_MS = 2 };

static void must(int result, const char *what) {
    if (result < 0)
        panic("%s: %s", what, strerror(errno));
}

static void mount_at(const char *type, const char *path, unsigned long flags, const char *options) {
    mkdir(path, 0755);
    must(mount(type, path, type, flags, options), path);
}

static void open_console(void) {
    for (int fd; (fd = open("/dev/console", O_RDWR | O_NOCTTY)) >= 0;)
        if (fd > STDERR_FILENO) {
            dup2(fd, STDOUT_FILENO);
            dup2(fd, STDERR_FILENO);
            close(fd);
            return;
        }
}

// A store through a shared mapping of a volume's file reaches the host when its page is written back: by
// default after 30 s. These are hundredths of a second: the age of a dirty page, and the pause between
// checks.
static void write_back_soon(void) {
    static const struct {
        const char *path, *value;
    } settings[] = {
        {"/proc/sys/vm/dirty_expire_centisecs", "50"},
        {"/proc/sys/vm/dirty_writeback_centisecs", "25"},
    };
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++) {
        autoclose int file = open(settings[i].path, O_WRONLY | O_CLOEXEC);
        if (file < 0 || write(file, settings[i].value, strlen(settings[i].value)) < 0)
            console_log("%s: %s", settings[i].path, strerror(errno));
    }
}

void boot_mounts(void) {
    // pivot_root(2) refuses the initial root file system: mount a bind of it over it
    mkdir("/root", 0755);
    must(mount("/", "/root", NULL, MS_BIND, NULL), "bind /");
    must(chdir("/root"), "bind /");
    must(mount(".", "/", NULL, MS_MOVE, NULL), "move /");
    must(chroot("."), "move /");
    must(chdir("/"), "move /");

    mount_at("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_at("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_at("devtmpfs", "/dev", MS_NOSUID, "mode=755");
    open_console();
    mount_at("cgroup2", GUEST_CGROUP, MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_at("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=755");
    write_back_soon();
}

// Enables every controller of the kernel for the cgroups beneath.
static void delegate(int cgroup) {
    struct buffer controllers = {0};
    cgroup_read(cgroup, "cgroup.controllers", &controllers);
    buffer_append(&controllers, "", 1);
    char *state = NULL, *text = (char *)controllers.data + controllers.start;
    for (char *name = strtok_r(text, " \n", &state); name; name = strtok_r(NULL, " \n", &state)) {
        char value[64];
        snprintf(value, sizeof value, "+%s", name);
        if (cgroup_write(cgroup, "cgroup.subtree_control", value) < 0)
            console_log("controller %s: %s", name, strerror(errno));
    }
    buffer_free(&controllers);
}

void boot_cgroups(struct agent *agent) {
    autoclose int root = open(GUEST_CGROUP, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct error error = {0};
    delegate(root);
    agent->cgroup = cgroup_make(root, "husk", &error);
    if (agent->cgroup < 0)
        panic("cgroup: %s", error.message);
    delegate(agent->cgroup);
    struct rlimit files = {FILES_MAX, FILES_MAX};
    setrlimit(RLIMIT_NOFILE, &files);
    reboot(RB_DISABLE_CAD);
}

// Reads the value of husk.channel on the kernel's command line.
static void read_channel_option(char *option, size_t size) {
    static char line[8192];
    autoclose int file = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = file >= 0 ? read(file, line, sizeof line - 1) : -1;
    const char *found = length > 0 ? strstr(line, "husk.channel=") : NULL;
    if (!found)
        panic("no husk.channel= on the kernel's command line");
    found += strlen("husk.channel=");
    snprintf(option, size, "%.*s", (int)strcspn(found, " \n"), found);
}

static bool is_port(int ports, const char *entry, const char *name) {
    char path[320], text[128] = "";
    snprintf(path, sizeof path, "%s/name", entry);
    autoclose int file = openat(ports, path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || read(file, text, sizeof text - 1) < 0)
        return false;
    text[strcspn(text, "\n")] = '\0';
    return !strcmp(text, name);
}

static int try_port(const char *name) {
    autoclosedir DIR *ports = opendir("/sys/class/virtio-ports");
    for (struct dirent *entry; ports && (entry = readdir(ports));)
        if (entry->d_name[0] != '.' && is_port(dirfd(ports), entry->d_name, name)) {
            char path[320];
            snprintf(path, sizeof path, "/dev/%s", entry->d_name);
            return open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
        }
    errno = ENODEV;
    return -1;
}

static void open_serial(struct agent *agent, const char *name) {
    for (int waited = 0; waited < PORT_WAIT_MS; waited += PORT_STEP_MS) {
        int fd = try_port(name);
        if (fd >= 0) {
            channel_link(&agent->channel, fd);
            return;
        }
        nanosleep(&(struct timespec){.tv_nsec = PORT_STEP_MS * 1000000L}, NULL);
    }
    panic("no virtio port named %s appeared within 10 s", name);
}

static void open_vsock(struct agent *agent, unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    must(fd, "vsock");
    must(bind(fd, (struct sockaddr *)&address, sizeof address), "vsock");
    must(listen(fd, 4), "vsock");
    channel_listen(&agent->channel, fd);
}

void boot_channel(struct agent *agent) {
    char option[256];
    read_channel_option(option, sizeof option);
    if (!strncmp(option, "serial:", 7))
        open_serial(agent, option + 7);
    else if (!strncmp(option, "vsock:", 6) && isdigit((unsigned char)option[6]))
        open_vsock(agent, (unsigned)strtoul(option + 6, NULL, 10));
    else
        panic("husk.channel=%s: expected serial:NAME or vsock:PORT", option);
}
