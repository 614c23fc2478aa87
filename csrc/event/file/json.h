// A strict reader of JSON (RFC 8259), for the headers of network files.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace iirsnn::event {

class Json {
 public:
  // std::invalid_argument: where the text stops being JSON, is nested deeper than 32, or repeats a key.
  static Json parse(std::string_view text);

  // Each raises std::invalid_argument where the value is of another kind or outside the bounds.
  int64_t integer(int64_t least = std::numeric_limits<int64_t>::min(),
                  int64_t most = std::numeric_limits<int64_t>::max()) const;
  double number() const;
  bool boolean() const;
  const std::string& string() const;
  const std::vector<Json>& array() const;
  const std::map<std::string, Json, std::less<>>& object() const;
  bool null() const { return kind_ == Kind::null; }
  std::string_view text() const { return text_; }  // of the value in what was parsed, which has to live on

  const Json& operator[](std::string_view key) const;  // of an object that has to have it
  const Json* find(std::string_view key) const;        // null where an object lacks it

 private:
  enum class Kind { null, boolean, number, string, array, object };
  friend class JsonReader;
  [[noreturn]] void expected(const char* what) const;

  Kind kind_ = Kind::null;
  bool boolean_ = false, whole_ = false;
  int64_t integer_ = 0;
  double number_ = 0;
  std::string_view text_;
  std::string string_;
  std::vector<Json> array_;
  std::map<std::string, Json, std::less<>> object_;
};

}  // namespace iirsnn::event
