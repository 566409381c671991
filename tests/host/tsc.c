// Prints the frequency of this machine's TSC in kHz, which is the emulated hosts' too: to some parts in a million, however
// busy the machine is, as of many readings that one counts which was least disturbed.
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

enum { READINGS = 1000, INTERVAL_NS = 200000000 };

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

// The time, and the TSC just then.
static double read_both(unsigned long long *tsc) {
    double best = 0, least = 1;
    for (int i = 0; i < READINGS; i++) {
        double before = seconds();
        unsigned long long found = __rdtsc();
        double took = seconds() - before;
        if (took < least) {
            least = took;
            best = before;
            *tsc = found;
        }
    }
    return best;
}

int main(void) {
    unsigned long long first = 0, last = 0;
    struct timespec interval = {0, INTERVAL_NS};
    double start = read_both(&first);
    nanosleep(&interval, NULL);
    double took = read_both(&last) - start;
    return printf("%.0f\n", (last - first) / took / 1000) < 0;
}
