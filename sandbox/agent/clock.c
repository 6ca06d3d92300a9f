#include "clock.h"

#include <errno.h>
#include <string.h>
#include <sys/timex.h>
#include <time.h>

#include "error.h"

enum { TICK_US = 10000, TICK_STEP_PPB = 100000 }; // one microsecond per tick is 100 ppm (adjtimex(2))

static int64_t read_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t wall_ns(void) {
    return read_ns(CLOCK_REALTIME);
}

uint64_t monotonic_ns(void) {
    return (uint64_t)read_ns(CLOCK_MONOTONIC);
}

void clock_set(int64_t wanted_ns, int64_t slack_ns) {
    int64_t off = wanted_ns - wall_ns();
    if (wanted_ns <= 0 || (off <= slack_ns && off >= -slack_ns))
        return;
    struct timespec wanted = {.tv_sec = wanted_ns / 1000000000, .tv_nsec = wanted_ns % 1000000000};
    if (clock_settime(CLOCK_REALTIME, &wanted) < 0)
        console_log("clock: %s", strerror(errno));
}

int clock_adjust(const ClockAdjustment *adjustment, bool check_only, struct error *error) {
    int64_t rate = adjustment->rate_ppb, step = adjustment->step_ns;
    if (rate > 100000000 || rate < -100000000)
        return fail_about(error, EINVAL, "clock", "rate is off by more than a tenth");
    if (check_only)
        return 0;
    struct timex change = {
        .modes = ADJ_TICK | ADJ_FREQUENCY,
        .tick = TICK_US + (long)(rate / TICK_STEP_PPB),
        .freq = (long)(rate % TICK_STEP_PPB * 65536 / 1000), // in 2^-16 ppm
    };
    if (adjtimex(&change) < 0)
        return fail(error, errno, "clock");
    if (step)
        clock_set(wall_ns() + step, 0);
    return 0;
}

void clock_read(Clocks *clocks) {
    clocks->wall_ns = wall_ns();
    clocks->raw_ns = (uint64_t)read_ns(CLOCK_MONOTONIC_RAW);
}
