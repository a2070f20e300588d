// PTX text as statements: opcodes, guards, operands as slots of one register file, labels resolved
// in their scopes. Immediates, special registers and addresses of symbols are slots too, filled
// when a thread starts, so that an instruction reads every operand alike. What is not understood is
// refused with its text.
#pragma once
#include "scheduler.h"

namespace ptx {

using emulator::Failure;

struct Operand {
  enum Kind { none, value, vector, address, label } kind = none;
  int slot = -1;       // of a value, or of an address's base
  int64_t offset = 0;  // of an address
  bool negated = false;
  std::string text;
  std::vector<Operand> parts;  // of a vector; of an address, what follows its comma: coordinates
  int second = -1;             // the q of p|q
};

struct Statement {
  std::string text, opcode;
  int guard = -1;
  bool guard_negated = false;
  std::vector<Operand> operands;
  std::vector<int> scopes;  // innermost last
};

struct Parameter {
  std::string name;
  int bytes = 0;
};
enum class Special {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid
};

// Generic addresses of parameters and shared memory: where no pointer of this process lies.
constexpr uint64_t kParameterSpace = 0x50000000, kParameterStep = 1 << 14,
                   kSharedSpace = uint64_t(0x7f) << 48;

struct Text {
  std::vector<Statement> statements;
  std::map<std::pair<std::string, int>, int> labels;  // (name, scope) -> index of a statement
  std::vector<Parameter> parameters;
  std::map<int, uint64_t> constants;  // slot -> value
  std::map<int, Special> specials;    // slot -> what it holds
  int slots = 0, static_shared = 0, most_threads = 1024;
  std::string dynamic_shared;  // name of the array whose size the launch gives
  int dynamic_at = 0;
};

inline std::string trim(const std::string& x) {
  const size_t a = x.find_first_not_of(" \t\n\r"), b = x.find_last_not_of(" \t\n\r");
  return a == std::string::npos ? "" : x.substr(a, b - a + 1);
}
inline std::vector<std::string> split(const std::string& t) {  // at commas outside of brackets
  std::vector<std::string> out(1);
  int depth = 0;
  for (char c : t) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == ',' && depth == 0)
      out.emplace_back();
    else
      out.back() += c;
  }
  for (auto& part : out) part = trim(part);
  return out;
}
inline int type_bytes(const std::string& type) {  // ".u64" -> 8
  const size_t digits = type.find_first_of("0123456789");
  if (type == ".pred") return 1;
  if (digits == std::string::npos) throw Failure("ptx: no size of type " + type);
  return std::atoi(type.c_str() + digits) / 8;
}

class Parser {
 public:
  static Text parse(const std::string& module, const std::string& entry) {
    Parser p;
    const std::string clean = without_comments(module);
    const size_t start = find_entry(clean, entry), open = clean.find('(', start),
                 close = clean.find(')', open);
    const size_t body = clean.find('{', close);
    for (auto& line : split(clean.substr(open + 1, close - open - 1))) p.parameter(line);
    const std::string between = clean.substr(close, body - close);
    for (const char* word : {".maxntid", ".reqntid"}) {
      const size_t at = between.find(word);
      if (at != std::string::npos) p.t_.most_threads = std::atoi(between.c_str() + at + 8);
    }
    p.module_scope(clean);
    p.body(clean, body);
    return std::move(p.t_);
  }
  // Names of a module's kernels.
  static std::vector<std::string> entries(const std::string& module) {
    std::vector<std::string> names;
    const std::string clean = without_comments(module);
    for (size_t at = clean.find(".entry "); at != std::string::npos;
         at = clean.find(".entry ", at + 1))
      names.push_back(trim(clean.substr(at + 7, clean.find('(', at) - at - 7)));
    return names;
  }

 private:
  Text t_;
  std::vector<int> scope_{0};
  std::vector<std::map<std::string, int>> names_{1};  // registers of each open scope
  std::map<std::string, uint64_t> symbols_;
  std::set<std::string> ranges_;  // of registers
  std::map<uint64_t, int> constant_slots_;
  int scopes_ = 0;

  static std::string without_comments(const std::string& text) {
    std::string clean;
    for (size_t i = 0; i < text.size(); ++i) {
      const bool starts_line =
          clean.empty() || clean.back() == '\n' || clean.back() == '\t' || clean.back() == ' ';
      const bool directive =
          starts_line && (text.compare(i, 5, ".loc\t") == 0 || text.compare(i, 5, ".loc ") == 0 ||
                          text.compare(i, 5, ".file") == 0);
      if (text.compare(i, 2, "//") == 0 || directive)
        while (i < text.size() && text[i] != '\n') ++i;
      if (i < text.size()) clean += text[i];
    }
    return clean;
  }
  static size_t find_entry(const std::string& clean, const std::string& entry) {
    for (size_t at = clean.find(".entry "); at != std::string::npos;
         at = clean.find(".entry ", at + 1))
      if (trim(clean.substr(at + 7, clean.find('(', at) - at - 7)) == entry) return at;
    throw Failure("ptx: no entry " + entry);
  }

  void parameter(const std::string& line) {  // .param .align 8 .b8 name[80]   or   .param .u64 .ptr
                                             // .global .align 1 name
    if (line.empty()) return;
    const size_t last = line.find_last_of(" \t\n");
    std::string name = trim(line.substr(last));
    int count = 1;
    const size_t bracket = name.find('[');
    if (bracket != std::string::npos)
      count = std::atoi(name.c_str() + bracket + 1), name = name.substr(0, bracket);
    int bytes = 0;
    size_t at = line.find('.', 1);
    for (; at != std::string::npos; at = line.find('.', at + 1)) {
      const std::string word = trim(line.substr(at, line.find_first_of(" \t\n", at) - at));
      if (word == ".align" || word == ".ptr" || word == ".global") continue;
      bytes = type_bytes(word);
      break;
    }
    symbols_[name] = kParameterSpace + t_.parameters.size() * kParameterStep;
    t_.parameters.push_back({name, bytes * count});
  }

  // .extern .shared .align 16 .b8 name[];   .shared .align 4 .b8 name[128];
  void shared_variable(const std::string& line) {
    const size_t name_at = line.find_last_of(" \t", line.find('[')) + 1, bracket = line.find('[');
    if (bracket == std::string::npos) throw Failure("ptx: shared variable " + line);
    const std::string name = line.substr(name_at, bracket - name_at);
    const size_t align_at = line.find(".align");
    const int align = align_at == std::string::npos ? 8 : std::atoi(line.c_str() + align_at + 6);
    const int bytes = std::atoi(line.c_str() + bracket + 1);
    if (bytes == 0) {
      t_.dynamic_shared = name;
      t_.dynamic_at = std::max(align, 16);
      return;
    }
    t_.static_shared = (t_.static_shared + align - 1) / align * align;
    symbols_[name] = t_.static_shared;
    t_.static_shared += bytes;
  }
  void module_scope(const std::string& clean) {
    for (size_t at = clean.find(".shared "); at != std::string::npos;
         at = clean.find(".shared ", at + 1)) {
      const size_t line = clean.find_last_of(";{}\n", at) + 1;
      const std::string text = trim(clean.substr(line, clean.find(';', at) - line));
      if (text.rfind(".shared", 0) == 0 || text.rfind(".extern", 0) == 0) shared_variable(text);
    }
    if (!t_.dynamic_shared.empty()) {
      t_.dynamic_at = (t_.static_shared + t_.dynamic_at - 1) / t_.dynamic_at * t_.dynamic_at;
      symbols_[t_.dynamic_shared] = t_.dynamic_at;
    }
  }

  void body(const std::string& clean, size_t at) {
    std::string word;
    int depth = 0;
    for (; at < clean.size(); ++at) {
      const char c = clean[at];
      const bool fresh = trim(word).empty();
      if (fresh && c == '{') {
        ++depth, word.clear();
        scope_.push_back(++scopes_), names_.emplace_back();
      } else if (fresh && c == '}') {
        word.clear();
        scope_.pop_back(), names_.pop_back();
        if (--depth == 0) return;
      } else if (c == ';') {
        statement(trim(word));
        word.clear();
      } else if (c == ':' && clean[at + 1] != ':' && clean[at - 1] != ':' &&
                 trim(word).find_first_of(" \t,[{") == std::string::npos) {
        t_.labels[{trim(word), scope_.back()}] = int(t_.statements.size());
        word.clear();
      } else {
        word += c;
      }
    }
    throw Failure("ptx: the body does not end");
  }

  void statement(const std::string& text) {
    if (text.empty()) return;
    if (text.rfind(".reg", 0) == 0) {
      const size_t space = text.find_first_of(" \t", text.find('.', 4));
      for (auto& name : split(text.substr(space))) {
        const size_t range = name.find('<');  // %r<9>: %r0 to %r8
        if (range == std::string::npos)
          names_.back()[name] = t_.slots++;
        else
          ranges_.insert(name.substr(0, range));
      }
      return;
    }
    if (text.rfind(".shared", 0) == 0 || text.rfind(".pragma", 0) == 0)
      return;  // the first: seen by module_scope
    if (text[0] == '.') throw Failure("ptx: no meaning for " + text);
    Statement s;
    s.text = text;
    std::string rest = text;
    if (rest[0] == '@') {
      const size_t space = rest.find_first_of(" \t");
      s.guard_negated = rest[1] == '!';
      s.guard = slot(rest.substr(1 + s.guard_negated, space - 1 - s.guard_negated));
      rest = trim(rest.substr(space));
    }
    const size_t space = rest.find_first_of(" \t\n");
    s.opcode = rest.substr(0, space);
    if (space != std::string::npos)
      for (auto& part : split(rest.substr(space))) s.operands.push_back(operand(part));
    s.scopes = scope_;
    t_.statements.push_back(std::move(s));
  }

  int constant(uint64_t v) {
    const auto found = constant_slots_.find(v);
    if (found != constant_slots_.end()) return found->second;
    t_.constants[t_.slots] = v;
    return constant_slots_[v] = t_.slots++;
  }
  int slot(const std::string&
               name) {  // of a register; one that is declared as a range appears at first use
    for (size_t i = names_.size(); i-- > 0;) {
      const auto found = names_[i].find(name);
      if (found != names_[i].end()) return found->second;
    }
    static const std::map<std::string, Special> specials = {
        {"%tid.x", Special::tid_x},       {"%tid.y", Special::tid_y},
        {"%tid.z", Special::tid_z},       {"%ntid.x", Special::ntid_x},
        {"%ntid.y", Special::ntid_y},     {"%ntid.z", Special::ntid_z},
        {"%ctaid.x", Special::ctaid_x},   {"%ctaid.y", Special::ctaid_y},
        {"%ctaid.z", Special::ctaid_z},   {"%nctaid.x", Special::nctaid_x},
        {"%nctaid.y", Special::nctaid_y}, {"%nctaid.z", Special::nctaid_z},
        {"%laneid", Special::laneid}};
    const auto special = specials.find(name);
    if (special != specials.end()) {
      t_.specials[t_.slots] = special->second;
    } else if (!ranges_.count(name.substr(0, name.find_last_not_of("0123456789") + 1))) {
      return -1;
    }
    return names_[0][name] = t_.slots++;
  }

  Operand operand(std::string text) {
    Operand o;
    o.text = text;
    if (text.empty()) throw Failure("ptx: an operand is missing");
    if (text == "_") return o;
    if (text[0] == '!') o.negated = true, text = trim(text.substr(1));
    const size_t bar = text.find('|');
    if (text[0] == '{') {
      o.kind = Operand::vector;
      for (auto& part : split(text.substr(1, text.size() - 2))) o.parts.push_back(operand(part));
    } else if (text[0] == '[') {
      const auto parts = split(text.substr(1, text.size() - 2));
      std::string base = parts[0];
      const size_t plus = base.find_first_of("+", 1);
      if (plus != std::string::npos) {
        o.offset = std::stoll(base.substr(plus + 1), nullptr, 0);
        base = trim(base.substr(0, plus));
      }
      const Operand at = operand(base);
      if (at.kind != Operand::value) throw Failure("ptx: address " + text);
      o.kind = Operand::address, o.slot = at.slot;
      for (size_t i = 1; i < parts.size(); ++i) o.parts.push_back(operand(parts[i]));
    } else if (bar != std::string::npos) {
      o = operand(trim(text.substr(0, bar)));
      const Operand other = operand(trim(text.substr(bar + 1)));
      o.second = other.kind == Operand::none ? -1 : other.slot;
    } else if (text.rfind("0f", 0) == 0 || text.rfind("0d", 0) == 0) {
      o.kind = Operand::value, o.slot = constant(std::stoull(text.substr(2), nullptr, 16));
    } else if (isdigit(text[0]) || (text[0] == '-' && isdigit(text[1]))) {
      if (text.back() == 'U') text.pop_back();
      o.kind = Operand::value;
      o.slot = constant(text[0] == '-' ? uint64_t(std::stoll(text, nullptr, 0))
                                       : std::stoull(text, nullptr, 0));
    } else if (symbols_.count(text)) {
      o.kind = Operand::value, o.slot = constant(symbols_.at(text));
    } else {
      o.slot = slot(text);
      o.kind = o.slot < 0 ? Operand::label : Operand::value;
    }
    return o;
  }
};

}  // namespace ptx
