#include "event/file/tensors.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>

#include "event/file/json.h"

#if !defined(IIRSNN_NO_FILES) && (defined(__unix__) || defined(__APPLE__))
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#define IIRSNN_MAPS_FILES 1
#endif

namespace iirsnn::event {
namespace {

constexpr int64_t kLongestHeader = int64_t(64) << 20;

[[noreturn]] void bad(const std::string& what) { throw std::invalid_argument("safetensors: " + what); }

int64_t bytes_of(const std::string& dtype) {
  static constexpr struct {
    const char* name;
    int64_t bytes;
  } kTypes[] = {{"F32", 4}, {"I8", 1},  {"F64", 8}, {"F16", 2}, {"BF16", 2}, {"U8", 1}, {"BOOL", 1},
                {"I16", 2}, {"U16", 2}, {"I32", 4}, {"U32", 4}, {"I64", 8},  {"U64", 8}};
  for (const auto& type : kTypes) {
    if (dtype == type.name) return type.bytes;
  }
  bad("expected a type of tensor, got \"" + dtype + "\"");
}

TensorView view_of(const std::string& name, const Json& entry, std::string_view data) {
  TensorView view;
  view.dtype = entry["dtype"].string();
  int64_t bytes = bytes_of(view.dtype);
  for (const Json& size : entry["shape"].array()) {
    view.shape.push_back(size.integer(0));
    if (__builtin_mul_overflow(bytes, view.shape.back(), &bytes)) bad(name + ": larger than memory");
  }
  const std::vector<Json>& range = entry["data_offsets"].array();
  if (range.size() != 2) bad(name + ": expected two offsets, got " + std::to_string(range.size()));
  const int64_t first = range[0].integer(0, data.size()), last = range[1].integer(first, data.size());
  if (last - first != bytes) {
    bad(name + ": expected " + std::to_string(bytes) + " bytes, got " + std::to_string(last - first));
  }
  view.data = data.data() + first;
  view.bytes = bytes;
  return view;
}

// Eight bytes a step.
struct Crc32 {
  std::array<std::array<uint32_t, 256>, 8> table{};
  constexpr Crc32() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = byte;
      for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
      table[0][byte] = value;
    }
    for (int k = 1; k < 8; ++k) {
      for (int byte = 0; byte < 256; ++byte) {
        table[k][byte] = table[k - 1][byte] >> 8 ^ table[0][table[k - 1][byte] & 0xff];
      }
    }
  }
};
constexpr Crc32 kCrc32;

}  // namespace

int64_t TensorView::elements() const {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

Bytes Bytes::borrowed(const void* data, int64_t size) {
  Bytes bytes;
  bytes.data_ = static_cast<const char*>(data);
  bytes.size_ = size;
  return bytes;
}

#if !defined(IIRSNN_NO_FILES)
Bytes Bytes::of_file(const std::string& path) {
  const auto failed = [] {
    if (errno == ENOMEM) throw std::bad_alloc();
    throw std::invalid_argument(std::strerror(errno));
  };
  Bytes bytes;
#if IIRSNN_MAPS_FILES
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) failed();
  struct stat facts;
  if (fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode) || facts.st_size == 0) {
    close(file);
    throw std::invalid_argument("expected a file that is not empty");
  }
  bytes.size_ = facts.st_size;
  // A page off where the system would put it: there, touching a byte may map 2 MB, a large page of the cache.
  const int64_t page = sysconf(_SC_PAGESIZE), mapped = bytes.size_ + page;
  void* const place = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  void* data = place;
  if (place != MAP_FAILED) {
    data = mmap(static_cast<char*>(place) + page, bytes.size_, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 0);
  }
  close(file);
  if (place != MAP_FAILED) bytes.owner_.reset(place, [mapped](void* all) { munmap(all, mapped); });
  if (data == MAP_FAILED) failed();
  bytes.data_ = static_cast<const char*>(data);
#else
  std::FILE* const file = std::fopen(path.c_str(), "rb");
  if (!file) failed();
  auto content = std::make_shared<std::string>();
  char part[1 << 16];
  for (size_t read; (read = std::fread(part, 1, sizeof part, file)) > 0;) content->append(part, read);
  std::fclose(file);
  bytes.data_ = content->data();
  bytes.size_ = content->size();
  bytes.owner_ = content;
#endif
  return bytes;
}
#endif

void Bytes::forget() const {
#if IIRSNN_MAPS_FILES
  if (owner_) madvise(const_cast<char*>(data_), size_, MADV_DONTNEED);
#endif
}

Tensors::Tensors(std::string_view bytes) {
  if (bytes.size() < 8) bad("expected at least 8 bytes, got " + std::to_string(bytes.size()));
  uint64_t length = 0;
  for (int i = 0; i < 8; ++i) length |= uint64_t(static_cast<unsigned char>(bytes[i])) << (8 * i);
  if (length > bytes.size() - 8 || int64_t(length) > kLongestHeader) {
    bad("expected a header of at most " + std::to_string(bytes.size() - 8) + " bytes, got " + std::to_string(length));
  }
  const Json header = Json::parse(bytes.substr(8, length));
  const std::string_view data = bytes.substr(8 + length);
  std::vector<std::pair<const char*, int64_t>> parts;
  for (const auto& [name, entry] : header.object()) {
    if (name == "__metadata__") {
      for (const auto& [key, value] : entry.object()) text_[key] = value.string();
      continue;
    }
    const TensorView view = view_of(name, entry, data);
    parts.emplace_back(view.data, view.bytes);
    tensors_.emplace(name, view);
  }
  std::sort(parts.begin(), parts.end());
  const char* end = data.data();
  for (const auto& [first, size] : parts) {
    if (first != end) bad("expected tensors without gaps or overlaps");
    end += size;
  }
  if (end != data.data() + data.size()) bad("expected no bytes after the last tensor");
}

const TensorView* Tensors::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

uint32_t crc32(std::string_view bytes, uint32_t value) {
  const auto& table = kCrc32.table;
  const auto* at = reinterpret_cast<const unsigned char*>(bytes.data());
  size_t left = bytes.size();
  value = ~value;
  for (; left >= 8; at += 8, left -= 8) {
    value ^= uint32_t(at[0]) | uint32_t(at[1]) << 8 | uint32_t(at[2]) << 16 | uint32_t(at[3]) << 24;
    value = table[7][value & 0xff] ^ table[6][value >> 8 & 0xff] ^ table[5][value >> 16 & 0xff] ^
            table[4][value >> 24] ^ table[3][at[4]] ^ table[2][at[5]] ^ table[1][at[6]] ^ table[0][at[7]];
  }
  for (; left; ++at, --left) value = value >> 8 ^ table[0][(value ^ *at) & 0xff];
  return ~value;
}

}  // namespace iirsnn::event
