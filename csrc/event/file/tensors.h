// Reads safetensors: named arrays in one piece of memory, with text beside them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace iirsnn::event {

struct TensorView {
  std::string dtype;  // "F32", "I8", ... as safetensors names them
  std::vector<int64_t> shape;
  const char* data;  // aligned as the file has it: to a byte
  int64_t bytes;

  int64_t elements() const;
};

// The bytes of a file: mapped where the system can, else read.
class Bytes {
 public:
  static Bytes of_file(const std::string& path);          // std::invalid_argument: why it cannot be read; not in a
                                                          // build without files
  static Bytes borrowed(const void* data, int64_t size);  // has to outlive this
  std::string_view view() const { return {data_, size_t(size_)}; }
  void forget()
      const;  // what was read of a mapped file takes no memory of this process any more, until it is read again

 private:
  const char* data_ = nullptr;
  int64_t size_ = 0;
  std::shared_ptr<void> owner_;
};

// std::invalid_argument where the bytes are no safetensors: every size, offset and type is checked against the others
// before anything is read. The views point into the bytes.
class Tensors {
 public:
  explicit Tensors(std::string_view bytes);

  const TensorView* find(const std::string& name) const;  // null where there is none
  const std::map<std::string, TensorView>& all() const { return tensors_; }
  const std::map<std::string, std::string>& text() const { return text_; }  // "__metadata__"

 private:
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> text_;
};

// As zlib's: of `bytes`, going on from `value`.
uint32_t crc32(std::string_view bytes, uint32_t value = 0);

}  // namespace iirsnn::event
