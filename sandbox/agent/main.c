// husk-agent: PID 1 of a pod's micro-VM. It holds no policy: the host compiles a pod to plain instructions
// (guest/guest.proto), which the agent executes with plain system calls.

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"
#include "boot.h"
#include "derived.h"
#include "guest.h"
#include "modules.h"
#include "pod_init.h"
#include "serve.h"
#include "standalone.h"

static void make_directories(void) {
    umask(0022);
    if (mkdir(GUEST_RUN, 0755) < 0 || mkdir(GUEST_EMPTY, 0755) < 0 || mkdir(GUEST_FILES, 0711) < 0 ||
        mount("empty", GUEST_EMPTY, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC,
              "mode=755,nr_inodes=2") < 0)
        panic(GUEST_RUN ": %s", strerror(errno));
}

static _Noreturn void run_guest(struct agent *agent) {
    agent_record_phase(agent, "agent");
    boot_mounts();
    make_directories();
    agent_record_phase(agent, "mounts");
    modules_boot();
    agent_record_phase(agent, "modules");
    boot_cgroups(agent);
    derived_begin();
    serve_open(agent);
    boot_channel(agent);
    agent_record_phase(agent, "channel");
    serve_run(agent);
    sync();
    reboot(RB_POWER_OFF);
    panic("power off: %s", strerror(errno));
}

static int run_standalone(struct agent *agent, const struct standalone *standalone) {
    int listener = standalone_open(agent, standalone);
    if (geteuid() == 0)
        make_directories();
    agent_record_phase(agent, "agent");
    serve_open(agent);
    channel_listen(&agent->channel, listener);
    serve_run(agent);
    channel_close(&agent->channel);
    return 0;
}

static int usage(void) {
    fputs("usage: husk-agent --listen unix:PATH [--cgroup DIRECTORY] [--lenient-cgroup]\n"
          "In a VM it takes no arguments: see husk.channel= on the kernel's command line.\n",
          stderr);
    return 2;
}

int main(int argc, char **argv) {
    static struct agent agent;
    static const struct option options[] = {
        {"listen", required_argument, NULL, 'l'},
        {"cgroup", required_argument, NULL, 'c'},
        {"lenient-cgroup", no_argument, NULL, 'L'},
        {0},
    };
    struct standalone standalone = {0};
    if (argc > 0 && !strcmp(argv[0], POD_INIT_NAME))
        pod_init_main();
    if (argc > 0 && !strcmp(argv[0], MODPROBE_NAME))
        modprobe_main(argc, argv);
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (option == 'l' && !strncmp(optarg, "unix:", 5))
            standalone.listen = optarg + 5;
        else if (option == 'c')
            standalone.cgroup = optarg;
        else if (option == 'L')
            agent.lenient = true;
        else if (getpid() != 1) // the kernel passes unknown words of its command line as arguments
            return usage();
    }
    if (standalone.listen)
        return run_standalone(&agent, &standalone);
    if (getpid() != 1)
        return usage();
    run_guest(&agent);
}
