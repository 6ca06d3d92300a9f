// The error convention of the agent.
//
// A function that can fail takes `struct error *` as its last argument and returns 0 (or a file descriptor or
// a count) on success, -1 after having filled it. The error goes to the host as a Failure: which step failed,
// with which errno, and a sentence.
#pragma once

struct error {
    int number;        // errno; 0 where no system call failed
    char step[96];     // "exec", "mount /proc"
    char message[256]; // what the host shows after it
};

// Fills `error` with the step (printf-like) and the text of `number`. Always returns -1.
int fail(struct error *error, int number, const char *step, ...) __attribute__((format(printf, 3, 4)));

// Same, with the message "<subject>: <text of number>", or only the subject if `number` is 0.
int fail_about(struct error *error, int number, const char *step, const char *subject);

// Writes a line to the guest's console.
void console_log(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Logs a fatal error, then powers the VM off (as PID 1) or ends the process.
_Noreturn void panic(const char *format, ...) __attribute__((format(printf, 1, 2)));
