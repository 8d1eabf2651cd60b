// Threads that share the work of a decoder's step: torch's, which come together once for the whole step.
//
// A product of one row takes some microseconds, so that waiting for all threads at the end of each costs as much as it
// saves. Here the leader publishes work in parts, whoever is there takes one, and the leader waits for parts that have
// been taken, not for threads. At the end of a step it does wait for all of them, which on a machine that is busy with
// something else may take ten times as long as the step: whether threads come together at all is decided by what it was
// worth before (Pace).

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace fwp {

// Whether to compute alone or together, by the time that either took for the same work in this thread.
class Pace {
  public:
    // Calls f(together) for work of a certain size.
    template <class F>
    static void keep(int64_t size, const F& f) {
        thread_local Pace pace;
        const bool together = pace.choose(size);
        const auto begun = std::chrono::steady_clock::now();
        f(together);
        pace.learn(together, std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
    }

  private:
    static constexpr int64_t kLookAgain = 256, kLongestPause = 4096;

    bool choose(int64_t size) {
        if (at::get_num_threads() == 1 || at::in_parallel_region()) return false;
        if (size != size_) size_ = size, alone_ = 0, runs_ = 0;
        // The machine may have been busy when it was alone: look again at times.
        if (alone_ == 0 || ++runs_ % kLookAgain == 0) return false;
        return pause_ == 0 || --pause_ == 0;
    }

    void learn(bool together, double seconds) {
        if (!together) {
            alone_ = alone_ == 0 ? seconds : 0.8 * alone_ + 0.2 * seconds;
        } else if (seconds > alone_) {
            // As long that what was lost does not count.
            pause_ = last_pause_ = std::min(kLongestPause, std::max(2 * last_pause_, int64_t(8 * seconds / alone_)));
        } else {
            last_pause_ = std::max<int64_t>(4, last_pause_ / 2);
        }
    }

    int64_t size_ = 0, runs_ = 0;
    int64_t pause_ = 0, last_pause_ = 4;  // how many times to be alone: still, and after the last disappointment
    double alone_ = 0;
};

class Team {
  public:
    // Runs `lead(team)` on this thread, with the help of torch's other threads if it is to be `together`.
    template <class Lead>
    static void run(bool together, const Lead& lead) {
        Team team;
        team.alone_ = !together;
        if (!together) return lead(team);
        const int64_t threads = at::get_num_threads();
        team.most_parts_ = std::min(team.most_parts_, 16 * threads);
        at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
            if (begin > 0) return team.help();
            // Also if it throws: helpers would wait for ever.
            const Closing closing{team};
            lead(team);
        });
    }

    // Runs `lead(team)`, to which threads come for each work, and wait at its end: `lead` may call what has its own.
    template <class Lead>
    static void run_apart(const Lead& lead) {
        Team team;
        team.apart_ = true;
        lead(team);
    }

    // Calls f(begin, end) for ranges that make up [0, count); `cost`: of one, in about multiply-adds. Of the leader only.
    template <class F>
    void share(int64_t count, int64_t cost, const F& f) {
        constexpr int64_t kWorthSharing = 30000;
        const int64_t parts = std::min({count, count * cost / kWorthSharing, most_parts_});
        if (apart_) return at::parallel_for(0, count, std::max<int64_t>(1, kWorthSharing / std::max<int64_t>(1, cost)), f);
        if (alone_ || parts < 2) return f(int64_t(0), count);
        work_ = {[](const void* g, int64_t begin, int64_t end) { (*static_cast<const F*>(g))(begin, end); }, &f, count, parts};
        done_.store(0, std::memory_order_relaxed);
        const uint64_t published = (ticket_.load(std::memory_order_relaxed) | 0xffffffff) + 1;
        ticket_.store(published | uint64_t(parts) << 16, std::memory_order_release);
        while (take_part()) {
        }
        for (int64_t rounds = 0; done_.load(std::memory_order_acquire) < parts; ++rounds) wait(rounds);
    }

  private:
    struct Work {
        void (*call)(const void*, int64_t, int64_t);
        const void* f;
        int64_t count, parts;
    };

    struct Closing {
        Team& team;
        ~Closing() { team.closed_.store(true, std::memory_order_release); }
    };

    void help() {
        for (int64_t rounds = 0; !closed_.load(std::memory_order_acquire); ++rounds)
            take_part() ? void(rounds = 0) : wait(rounds);
    }

    // Whether there was one. A ticket is the number of the work, then 16 bits of its parts and 16 of those taken.
    bool take_part() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        int64_t part;
        do {
            part = ticket & 0xffff;
            if (part >= int64_t(ticket >> 16 & 0xffff)) return false;
        } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire));
        // The leader waits for this part, and leaves the work as it is.
        work_.call(work_.f, part * work_.count / work_.parts, (part + 1) * work_.count / work_.parts);
        done_.fetch_add(1, std::memory_order_release);
        return true;
    }

    static void wait(int64_t rounds) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        // Somebody else may need the processor.
        if (rounds % 64 == 63) std::this_thread::yield();
    }

    bool alone_ = false, apart_ = false;
    // Enough for all to end at about the same time, and few, since neighbours are read on quicker by the same thread.
    int64_t most_parts_ = 1 << 10;
    Work work_{};
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<bool> closed_{false};
};

}  // namespace fwp
