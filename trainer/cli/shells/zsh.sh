_attention_trainer() {
  local first=2 command
  local -a found
  [[ ${words[1]:t} == python* ]] && first=4
  (( first < CURRENT )) && command=${words[first]}
  if [[ $command == data ]] && (( first + 1 < CURRENT )); then command="data ${words[first+1]}"; fi
  found=("${(@f)$(_attention_trainer_words "$command" "$PREFIX" | _attention_trainer_next "$PREFIX")}")
  found=(${found:#})
  if (( ! $#found )); then
    compset -P '*='
    _files
    return
  fi
  compadd -S '' -- ${(M)found:#*[=.]}
  compadd -- ${found:#*[=.]}
}

_attention_trainer_python() {
  if (( CURRENT > 3 )) && [[ ${words[2]} == -m && ${words[3]} == trainer ]]; then
    _attention_trainer
  elif typeset -f _python >/dev/null; then
    _python "$@"
  else
    _files
  fi
}

if ! typeset -f compdef >/dev/null; then
  autoload -Uz compinit
  compinit
fi
compdef _attention_trainer attention-trainer
compdef _attention_trainer_python python python3
