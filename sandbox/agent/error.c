#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <unistd.h>

int fail(struct error *error, int number, const char *step, ...) {
    va_list arguments;
    va_start(arguments, step);
    vsnprintf(error->step, sizeof error->step, step, arguments);
    va_end(arguments);
    error->number = number;
    snprintf(error->message, sizeof error->message, "%s", number ? strerror(number) : "refused");
    return -1;
}

int fail_about(struct error *error, int number, const char *step, const char *subject) {
    fail(error, number, "%s", step);
    if (number)
        snprintf(error->message, sizeof error->message, "%.180s: %s", subject, strerror(number));
    else
        snprintf(error->message, sizeof error->message, "%.250s", subject);
    return -1;
}

static void print(const char *format, va_list arguments) {
    char line[512] = "husk-agent: ";
    size_t length = strlen(line);
    vsnprintf(line + length, sizeof line - length - 1, format, arguments);
    strcat(line, "\n");
    if (write(STDERR_FILENO, line, strlen(line)) < 0)
        return; // there is no console
}

void console_log(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print(format, arguments);
    va_end(arguments);
}

void panic(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print(format, arguments);
    va_end(arguments);
    // exiting as PID 1 would add a kernel panic to the message; in a PID namespace of the host reboot(2)
    // ends only that namespace
    if (getpid() == 1)
        reboot(RB_POWER_OFF);
    _exit(1);
}
