#include "configure.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/random.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "clock.h"
#include "guest.h"
#include "inodes.h"
#include "modules.h"
#include "net.h"
#include "scope.h"

enum { CPUS_MAX = 256, APPEAR_MS = 5000, APPEAR_STEP_MS = 5 };

static int add_entropy(const struct agent *agent, const ProtobufCBinaryData *bytes, struct error *error) {
    if (agent->test || bytes->len == 0)
        return 0;
    autoclose int random = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    autofree struct rand_pool_info *pool = memory_get(sizeof *pool + bytes->len);
    pool->entropy_count = (int)bytes->len * 8;
    pool->buf_size = (int)bytes->len;
    memcpy(pool->buf, bytes->data, bytes->len);
    if (random < 0 || ioctl(random, RNDADDENTROPY, pool) < 0 || ioctl(random, RNDRESEEDCRNG) < 0)
        return fail(error, errno, "entropy");
    return 0;
}

static int write_machine_id(const char *machine_id, struct error *error) {
    if (!*machine_id)
        return 0;
    autoclose int file = open(GUEST_MACHINE_ID, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0444);
    if (file < 0 || dprintf(file, "%s\n", machine_id) < 0)
        return fail(error, errno, "machine id");
    return 0;
}

bool is_mounted(const char *path) {
    struct stat here, above;
    char parent[PATH_MAX];
    snprintf(parent, sizeof parent, "%s/..", path);
    return stat(path, &here) == 0 && stat(parent, &above) == 0 && here.st_dev != above.st_dev;
}

static int make_directories(const char *path) {
    char part[PATH_MAX];
    if (snprintf(part, sizeof part, "%s", path) >= (int)sizeof part)
        return -1;
    for (char *slash = strchr(part + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(part, 0755);
        *slash = '/';
    }
    return mkdir(part, 0755) < 0 && errno != EEXIST ? -1 : 0;
}

// A share may have been hot-plugged a moment ago: the mount is retried until the kernel knows its tag.
static int mount_share(const char *tag, const char *path, struct error *error) {
    if (make_directories(path) < 0)
        return fail(error, errno, "share %s", tag);
    if (is_mounted(path))
        return 0;
    for (int waited = 0;; waited += APPEAR_STEP_MS) {
        if (mount(tag, path, "virtiofs", 0, NULL) == 0)
            return 0;
        if ((errno != EINVAL && errno != ENODEV) || waited >= APPEAR_MS)
            return fail(error, errno, "share %s", tag);
        nanosleep(&(struct timespec){.tv_nsec = APPEAR_STEP_MS * 1000000L}, NULL);
    }
}

static int mount_shm(uint64_t bytes, struct error *error) {
    char options[64];
    snprintf(options, sizeof options, "mode=1777,size=%llu", (unsigned long long)bytes);
    if (make_directories(GUEST_SHM) < 0)
        return fail(error, errno, "shm");
    if (!is_mounted(GUEST_SHM) &&
        mount("shm", GUEST_SHM, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options) < 0)
        return fail(error, errno, "shm");
    return 0;
}

// Whether the sysctl belongs to a namespace: all that may be set in standalone mode.
static bool is_namespaced(const char *path) {
    static const char *const prefixes[] = {"net/", "kernel/shm", "kernel/msg", "kernel/sem", "fs/mqueue/"};
    for (size_t i = 0; i < sizeof prefixes / sizeof prefixes[0]; i++)
        if (!strncmp(path, prefixes[i], strlen(prefixes[i])))
            return true;
    return false;
}

static int set_sysctl(const struct agent *agent, const char *path, const char *value, struct error *error) {
    char full[PATH_MAX];
    if (strstr(path, "..") || snprintf(full, sizeof full, "/proc/sys/%s", path) >= (int)sizeof full)
        return fail(error, EINVAL, "sysctl %s", path);
    if (agent->test && !is_namespaced(path))
        return fail(error, EPERM, "sysctl %s", path);
    int opened = open(full, O_WRONLY | O_CLOEXEC);
    if (opened < 0 && errno == ENOENT && !agent->test && modules_of_sysctl(path))
        opened = open(full, O_WRONLY | O_CLOEXEC);
    autoclose int file = opened;
    if (file < 0 || write(file, value, strlen(value)) < 0)
        return fail(error, errno, "sysctl %s", path);
    return 0;
}

int prepare_vm(struct agent *agent, const Prepare *prepare, struct error *error) {
    if (agent->test && geteuid() != 0)
        return fail(error, EPERM, "prepare"); // there are no namespaces to do it in
    if (mount_shm(prepare->shm_bytes, error) < 0)
        return -1;
    for (size_t i = 0; i < prepare->n_shares; i++) {
        const Share *share = prepare->shares[i];
        if (mount_share(share->tag, share->path, error) < 0)
            return -1;
        if (share->submounts && !agent->submounts)
            agent->submounts = strdup(share->path);
    }
    return inodes_keep_below(agent, prepare->cached_inodes, error);
}

// Brings CPU `number` online; returns whether it is. CPU 0 often cannot be switched, and then has no file.
static bool bring_online(unsigned number) {
    char path[64], state = '1';
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%u", number);
    if (access(path, F_OK) < 0)
        return false;
    strcat(path, "/online");
    autoclose int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return number == 0;
    if (read(file, &state, 1) == 1 && state == '0' && pwrite(file, "1", 1, 0) < 0)
        console_log("%s: %s", path, strerror(errno));
    return pread(file, &state, 1, 0) == 1 && state == '1';
}

int online_cpus(struct agent *agent, uint32_t count, struct error *error) {
    if (agent->test)
        return 0;
    for (int waited = 0;; waited += APPEAR_STEP_MS) {
        uint32_t online = 0;
        for (unsigned number = 0; number < CPUS_MAX && online < count; number++)
            online += bring_online(number);
        if (online >= count)
            return 0;
        if (waited >= APPEAR_MS)
            return fail(error, ENODEV, "CPUs: %u of %u came online", online, count);
        nanosleep(&(struct timespec){.tv_nsec = APPEAR_STEP_MS * 1000000L}, NULL);
    }
}

int configure_pod(struct agent *agent, const Configure *configure, struct error *error) {
    if (agent->test && geteuid() != 0)
        return fail(error, EPERM, "configure"); // there are no namespaces to do it in
    if (add_entropy(agent, &configure->entropy, error) < 0)
        return -1;
    // a clone of a template has the time of the snapshot, and nothing runs yet that a step would disturb
    if (!agent->test)
        clock_set(configure->wall_ns, 0);
    if (*configure->hostname && sethostname(configure->hostname, strlen(configure->hostname)) < 0)
        return fail(error, errno, "hostname");
    if (write_machine_id(configure->machine_id, error) < 0)
        return -1;
    if (net_configure(configure->interfaces, configure->n_interfaces, configure->routes, configure->n_routes,
                      error) < 0)
        return -1;
    // after the network, as some belong to an interface
    for (size_t i = 0; i < configure->n_sysctls; i++)
        if (set_sysctl(agent, configure->sysctls[i]->path, configure->sysctls[i]->value, error) < 0)
            return -1;
    if (configure->dry_run)
        return net_deconfigure(configure->interfaces, configure->n_interfaces, error);
    agent->configured = true;
    return 0;
}
