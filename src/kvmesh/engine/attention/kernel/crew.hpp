// Threads that sleep until there is work, and never spin: a neighbour on the same cores loses nothing to them.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace kvmesh {

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
        if (alone || members_.empty()) {
            for (int i = 0; i < count; ++i) work(i, 0);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = work, count_ = count, next_ = 0, busy_ = members_.size(), ++round_;
        }
        wake_.notify_all();
        drain(0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }

  private:
    void drain(int thread) {
        for (int i; (i = next_.fetch_add(1)) < count_;) work_(i, thread);
    }
    void serve(int thread) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (uint64_t seen = 0;;) {
            wake_.wait(lock, [&] { return closing_ || round_ != seen; });
            if (closing_) return;
            seen = round_;
            lock.unlock();
            drain(thread);
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::vector<std::thread> members_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::atomic<int> next_{0};
    std::function<void(int, int)> work_;
    int count_ = 0;
    size_t busy_ = 0;
    uint64_t round_ = 0;
    bool closing_ = false;
};

}  // namespace kvmesh
