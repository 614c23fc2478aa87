#include "event/file/json.h"

#include <charconv>
#include <cstring>
#include <stdexcept>

namespace iirsnn::event {

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : at_(text.data()), first_(at_), end_(at_ + text.size()) {}

  Json document() {
    Json value = this->value(0);
    skip_space();
    if (at_ != end_) fail("the end");
    return value;
  }

 private:
  static constexpr int kDeepest = 32;

  [[noreturn]] void fail(const char* wanted) const {
    throw std::invalid_argument("JSON: expected " + std::string(wanted) + " at byte " + std::to_string(at_ - first_));
  }
  void skip_space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_;
  }
  bool take(char c) {
    skip_space();
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }
  void need(char c, const char* wanted) {
    if (!take(c)) fail(wanted);
  }
  bool take(std::string_view word) {
    if (std::string_view(at_, end_ - at_).substr(0, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json value(int depth) {
    using Kind = Json::Kind;
    if (depth > kDeepest) fail("less nesting");
    Json value;
    skip_space();
    const char* const from = at_;
    if (take('{')) {
      value.kind_ = Kind::object;
      for (bool first = true; !take('}'); first = false) {
        if (!first) need(',', "a comma or }");
        skip_space();
        std::string key = string();
        need(':', "a colon");
        Json of = this->value(depth + 1);
        if (!value.object_.emplace(std::move(key), std::move(of)).second) fail("every key once");
      }
    } else if (take('[')) {
      value.kind_ = Kind::array;
      for (bool first = true; !take(']'); first = false) {
        if (!first) need(',', "a comma or ]");
        value.array_.push_back(this->value(depth + 1));
      }
    } else if (at_ != end_ && *at_ == '"') {
      value.kind_ = Kind::string;
      value.string_ = string();
    } else if (take("true")) {
      value.kind_ = Kind::boolean;
      value.boolean_ = true;
    } else if (take("false")) {
      value.kind_ = Kind::boolean;
    } else if (!take("null")) {
      number(value);
    }
    value.text_ = {from, size_t(at_ - from)};
    return value;
  }

  bool digit() const { return at_ != end_ && *at_ >= '0' && *at_ <= '9'; }
  void digits() {
    if (!digit()) fail("a value");
    while (digit()) ++at_;
  }
  void number(Json& value) {
    const char* const from = at_;
    value.kind_ = Json::Kind::number;
    value.whole_ = true;
    if (at_ != end_ && *at_ == '-') ++at_;
    if (at_ != end_ && *at_ == '0') {
      ++at_;
    } else {
      digits();
    }
    if (at_ != end_ && *at_ == '.') {
      ++at_;
      digits();
      value.whole_ = false;
    }
    if (at_ != end_ && (*at_ == 'e' || *at_ == 'E')) {
      ++at_;
      if (at_ != end_ && (*at_ == '+' || *at_ == '-')) ++at_;
      digits();
      value.whole_ = false;
    }
    if (value.whole_) value.whole_ = std::from_chars(from, at_, value.integer_).ec == std::errc();
    if (std::from_chars(from, at_, value.number_).ec != std::errc()) fail("a number that a double holds");
  }

  unsigned hexadecimal() {
    if (end_ - at_ < 4) fail("four hexadecimal digits");
    unsigned code = 0;
    const auto [stop, error] = std::from_chars(at_, at_ + 4, code, 16);
    if (error != std::errc() || stop != at_ + 4) fail("four hexadecimal digits");
    at_ += 4;
    return code;
  }
  static void add_utf8(std::string& to, unsigned code) {
    if (code < 0x80) {
      to += char(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    to += char((0xff00u >> (more + 1) & 0xff) | code >> (6 * more));
    for (int i = more - 1; i >= 0; --i) to += char(0x80 | (code >> (6 * i) & 0x3f));
  }
  void escape(std::string& to) {
    const char c = *at_++;
    static constexpr char kFrom[] = "\"\\/bfnrt", kTo[] = "\"\\/\b\f\n\r\t";
    if (c == 'u') {
      unsigned code = hexadecimal();
      if (code >= 0xd800 && code < 0xdc00) {
        if (!take("\\u")) fail("the second half of a surrogate pair");
        const unsigned low = hexadecimal();
        if (low < 0xdc00 || low > 0xdfff) fail("the second half of a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      } else if (code >= 0xdc00 && code < 0xe000) {
        fail("the first half of a surrogate pair");
      }
      add_utf8(to, code);
    } else if (const char* found = c ? std::strchr(kFrom, c) : nullptr) {
      to += kTo[found - kFrom];
    } else {
      fail("an escape");
    }
  }
  std::string string() {
    if (at_ == end_ || *at_ != '"') fail("a string");
    ++at_;
    std::string text;
    for (;;) {
      const char* const from = at_;
      while (at_ != end_ && *at_ != '"' && *at_ != '\\' && static_cast<unsigned char>(*at_) >= 0x20) ++at_;
      text.append(from, at_);
      if (at_ == end_) fail("the end of a string");
      if (*at_ == '"') {
        ++at_;
        return text;
      }
      if (*at_ != '\\' || end_ - at_ < 2) fail("a character");
      ++at_;
      escape(text);
    }
  }

  const char *at_, *first_, *end_;
};

Json Json::parse(std::string_view text) { return JsonReader(text).document(); }

void Json::expected(const char* what) const {
  static constexpr const char* kNames[] = {"null", "true or false", "a number", "a string", "a list", "an object"};
  throw std::invalid_argument("expected " + std::string(what) + ", got " + kNames[int(kind_)]);
}

int64_t Json::integer(int64_t least, int64_t most) const {
  if (kind_ == Kind::number && whole_ && integer_ >= least && integer_ <= most) return integer_;
  std::string wanted = "expected an integer";
  if (most < std::numeric_limits<int64_t>::max()) {
    wanted += " from " + std::to_string(least) + " to " + std::to_string(most);
  }
  throw std::invalid_argument(wanted + ", got " + std::string(text_.substr(0, 60)));
}
double Json::number() const {
  if (kind_ != Kind::number) expected("a number");
  return number_;
}
bool Json::boolean() const {
  if (kind_ != Kind::boolean) expected("true or false");
  return boolean_;
}
const std::string& Json::string() const {
  if (kind_ != Kind::string) expected("a string");
  return string_;
}
const std::vector<Json>& Json::array() const {
  if (kind_ != Kind::array) expected("a list");
  return array_;
}
const std::map<std::string, Json, std::less<>>& Json::object() const {
  if (kind_ != Kind::object) expected("an object");
  return object_;
}
const Json* Json::find(std::string_view key) const {
  const auto& all = object();
  const auto found = all.find(key);
  return found == all.end() ? nullptr : &found->second;
}
const Json& Json::operator[](std::string_view key) const {
  const auto& all = object();
  const auto found = all.find(key);
  if (found == all.end()) throw std::invalid_argument("expected \"" + std::string(key) + "\", which is missing");
  return found->second;
}

}  // namespace iirsnn::event
