// Threads for work of a few microseconds, shared out item by item.
//
// A thread that finds none spins for as long as a layer's next step may take to come, and then sleeps, so that a
// neighbour on the same cores loses next to nothing. Nobody waits for a thread that has not begun: on a busy core the
// caller does all of the work itself.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace kvmesh {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// `threads` threads, one of which is the caller's.
class Crew {
  public:
    explicit Crew(int threads) {
        for (int i = 1; i < threads; ++i) members_.emplace_back([this, i] { serve(i); });
    }
    ~Crew() {
        { std::lock_guard<std::mutex> lock(mutex_); closing_ = true; }
        wake_.notify_all();
        for (auto& member : members_) member.join();
    }
    int size() const { return static_cast<int>(members_.size()) + 1; }

    // Calls work(i, thread) for i in [0, count), by all threads or by this one alone.
    template <class F> void run(int count, bool alone, const F& work) {
        if (alone || members_.empty() || count < 2) {
            for (int i = 0; i < count; ++i) work(i, 0);
            return;
        }
        call_ = [](const void* f, int i, int thread) { (*static_cast<const F*>(f))(i, thread); };
        work_ = &work, count_ = count, next_ = 0;
        const uint64_t round = (state_.load() / ROUND + 1) * ROUND;
        state_ = round + OPEN;
        if (asleep_ > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        drain(0);
        state_ -= OPEN;
        for (int i = 0; state_.load() != round; ++i) i < SPINS ? pause() : std::this_thread::yield();
    }

  private:
    // The state is the number of the round, whether one may still join it, and how many have joined and not left.
    static constexpr uint64_t OPEN = 1 << 16, ROUND = 2 * OPEN;
    static constexpr int SPINS = 2000;

    void drain(int thread) {
        for (int i; (i = next_.fetch_add(1)) < count_;) call_(work_, i, thread);
    }
    // True if there was a round that is not the one of `seen`, open until this thread had joined.
    bool join(uint64_t& seen) {
        uint64_t state = state_.load();
        while (state & OPEN && state / ROUND != seen)
            if (state_.compare_exchange_weak(state, state + 1)) return seen = state / ROUND, true;
        return false;
    }
    void serve(int thread) {
        for (uint64_t seen = 0;;) {
            bool joined = false;
            for (int i = 0; i < SPINS && !(joined = join(seen)); ++i) pause();
            if (!joined) {
                std::unique_lock<std::mutex> lock(mutex_);
                ++asleep_;
                wake_.wait(lock, [&] { return closing_ || (joined = join(seen)); });
                --asleep_;
                if (!joined) return;
            }
            drain(thread);
            --state_;
        }
    }

    std::vector<std::thread> members_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> state_{0};
    std::atomic<int> next_{0}, asleep_{0};
    void (*call_)(const void*, int, int) = nullptr;
    const void* work_ = nullptr;
    int count_ = 0;
    bool closing_ = false;
};

}  // namespace kvmesh
