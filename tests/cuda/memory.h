// Shared and global memory: bounds, alignment, races, bank conflicts, and cp.async, which lands as
// late as it may.
#pragma once
#include "block.h"

namespace emulator {

inline uint8_t* shared_at(smem a) { return current()->shared.data() + a; }
inline std::string place(smem a) { return "shared byte " + std::to_string(a); }

inline void check_shared(smem a, int bytes, const char* what) {
  if (a % bytes) fail(std::string(what) + ": misaligned " + place(a));
  if (uint64_t(a) + bytes > current()->shared.size())
    fail(std::string(what) + ": " + place(a) + " is out of bounds");
}

// visit(shadow, first byte, bytes): whole words where the access is whole, else the bytes of words
// split for good.
template <class Visit>
void each_shadow(smem a, int bytes, Visit visit) {
  for (smem w = a / 4; w <= (a + bytes - 1) / 4; ++w) {
    Shadow& word = current()->shadows[w];
    const smem first = std::max(a, w * 4), last = std::min(a + bytes, w * 4 + 4);
    if (!word.bytes && last - first == 4) {
      visit(word, first, 4);
      continue;
    }
    if (!word.bytes) {
      auto split = std::make_unique<std::array<Shadow, 4>>();
      for (Shadow& s : *split) {
        s.writer = word.writer, s.written = word.written, s.generic = word.generic,
        s.landing = word.landing;
        s.was_read = word.was_read, s.reads = word.reads;
      }
      word.bytes = std::move(split);
    }
    for (smem byte = first; byte < last; ++byte) visit((*word.bytes)[byte % 4], byte, 1);
  }
}

inline void remember_read(Shadow& s, int who, uint32_t when) {
  if (s.reads.empty()) s.reads.assign(current()->threads.size() + kAgents, 0);
  s.reads[who] = when;
  s.was_read = true;
}

inline void note_read(smem a, int bytes, const char* what) {
  check_shared(a, bytes, what);
  Thread& t = self();
  each_shadow(a, bytes, [&](Shadow& s, smem byte, int) {
    if (s.landing >= 0)
      fail(std::string(what) + " reads " + place(byte) + " before thread " +
           std::to_string(s.landing) + " waited for its asynchronous copy");
    if (s.writer >= 0 && s.writer != t.id && t.clock[s.writer] < s.written)
      fail(std::string(what) + " reads " + place(byte) + ", written by thread " +
           std::to_string(s.writer) + ", with no barrier between");
    remember_read(s, t.id, t.clock[t.id]);
  });
}

// Whether a lane of the same warp wrote there with the same instruction, and may have.
inline bool tied(const Shadow& s) {
  Launch& launch = current()->launch;
  if (!launch.ties || s.writer / 32 != self().id / 32 || !s.at || s.at != self().at) return false;
  ++launch.tied;
  return true;
}

// `data`: what will be written. Two threads may write equal bytes with no barrier between; Triton
// does.
inline void note_write(smem a, int bytes, const char* what, const void* data = nullptr) {
  check_shared(a, bytes, what);
  Thread& t = self();
  each_shadow(a, bytes, [&](Shadow& s, smem byte, int size) {
    const auto fresh = static_cast<const uint8_t*>(data) + (byte - a);
    if (s.landing >= 0 && s.landing != t.id)
      fail(std::string(what) + " overwrites " + place(byte) + " while a copy of thread " +
           std::to_string(s.landing) + " is under way");
    if (s.writer >= 0 && s.writer != t.id && t.clock[s.writer] < s.written &&
        !(data && std::memcmp(shared_at(byte), fresh, size) == 0) &&
        !(data && size == 4 && tied(s)))
      fail(std::string(what) + " overwrites " + place(byte) + ", written by thread " +
           std::to_string(s.writer) + ", with no barrier between");
    if (s.was_read) {
      for (size_t u = 0; u < s.reads.size(); ++u)
        if (int(u) != t.id && t.clock[u] < s.reads[u])
          fail(std::string(what) + " overwrites " + place(byte) + ", read by thread " +
               std::to_string(u) + ", with no barrier between");
      s.was_read = false;
      std::fill(s.reads.begin(), s.reads.end(), 0);
    }
    s.writer = t.id;
    s.written = t.clock[t.id];
    s.generic = true;
    s.at = t.at;
  });
}

// ---- global memory ----

inline void check_global(const void* p, size_t bytes, const char* what) {
  const auto at = static_cast<const uint8_t*>(p);
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail(std::string(what) + ": misaligned global address");
  for (const Buffer& b : current()->launch.buffers)
    if (at >= b.first && at + bytes <= b.first + b.size) return;
  fail(std::string(what) + ": global access out of bounds");
}

// Races over global memory: between blocks, which nothing orders, and between threads of one that
// no barrier orders. Of several readers the last is remembered. Equal bytes may be written twice.
inline void note_global(const void* p, int bytes, const char* what, const void* data = nullptr) {
  check_global(p, bytes, what);
  Block& b = *current();
  Thread& t = self();
  const int block = b.number();
  auto ordered = [&](int of, int thread, uint32_t when) {
    return of < 0 || (of == block && (thread == t.id || t.clock[thread] >= when));
  };
  const auto first = reinterpret_cast<uintptr_t>(p);
  const bool narrow = bytes < 4;  // kept apart from whole words: nobody mixes the two
  const bool equal = data && std::memcmp(p, data, bytes) == 0;
  for (uintptr_t a = first; a < first + bytes; a += 4) {
    GlobalWord& w = b.launch.global[narrow ? a * 2 + 1 : a * 2];
    if (!ordered(w.block, w.writer, w.written) && !equal)
      fail(std::string(what) + " of global memory that block " + std::to_string(w.block) +
           " thread " + std::to_string(w.writer) + " wrote, with nothing between");
    if (data && !equal && !ordered(w.reader_block, w.reader, w.read))
      fail(std::string(what) + " of global memory that block " + std::to_string(w.reader_block) +
           " thread " + std::to_string(w.reader) + " read, with nothing between");
    if (data)
      w.block = block, w.writer = t.id, w.written = t.clock[t.id];
    else
      w.reader_block = block, w.reader = t.id, w.read = t.clock[t.id];
  }
}

// ---- bank conflicts of ordinary accesses: what one warp touches at one instruction ----

inline int conflicts(const std::vector<std::pair<smem, int>>& lanes) {
  const int bytes = lanes.front().second,
            together = bytes <= 4 ? 32 : 128 / bytes;  // lanes of one pass
  int extra = 0;
  for (size_t first = 0; first < lanes.size(); first += together) {
    std::set<smem> banks[32];
    for (size_t i = first; i < std::min(lanes.size(), first + together); ++i)
      for (smem w = lanes[i].first / 4; w <= (lanes[i].first + bytes - 1) / 4; ++w)
        banks[w % 32].insert(w);
    size_t most = 1;
    for (auto& bank : banks) most = std::max(most, bank.size());
    extra += int(most) - 1;
  }
  return extra;
}
// `instruction` names the place in the code, `times` how often this thread came there.
inline void count_conflicts(int instruction, uint64_t times, smem a, int bytes) {
  Block& b = *current();
  const auto key = std::make_tuple(self().id / 32, instruction, times);
  auto& lanes = b.warp_accesses[key];
  lanes.emplace_back(a, bytes);
  if (lanes.size() < 32) return;
  b.launch.shared_conflicts += conflicts(lanes);
  b.warp_accesses.erase(key);
}
inline void count_remaining_conflicts(Block& b) {
  for (auto& access : b.warp_accesses) b.launch.shared_conflicts += conflicts(access.second);
}

// ---- cp.async ----

inline void copy_async(smem to, const void* from, int bytes, int given) {
  Copy c{to, {}, bytes};
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async: copies 4, 8 or 16 bytes");
  if (given < 0 || given > bytes) fail("cp.async: source size out of range");
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("cp.async: misaligned global address");
  if (given == bytes)
    note_global(from, bytes, "cp.async");
  else if (given)
    fail("cp.async: a source of part of the bytes is not modelled");
  if (given) std::memcpy(c.data, from, given);
  note_write(to, bytes, "cp.async");  // it may land now, so nobody may still read there
  each_shadow(to, bytes, [](Shadow& s, smem, int) { s.landing = self().id; });
  self().open.push_back(c);
}
inline void copy_async_commit() {
  Thread& t = self();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}
inline void copy_async_wait(size_t left) {
  Thread& t = self();
  while (t.groups.size() > left) {
    for (const Copy& c : t.groups.front()) {
      std::memcpy(shared_at(c.to), c.data, c.bytes);
      each_shadow(c.to, c.bytes, [&](Shadow& s, smem, int) {
        if (s.landing == t.id) s.landing = -1;
        s.writer = t.id;
        s.written = t.clock[t.id];
        s.generic = current()->launch.strict_proxies;
      });
    }
    t.groups.erase(t.groups.begin());
  }
}

}  // namespace emulator
