_attention_trainer() {
  local line=${COMP_LINE:0:COMP_POINT} current command start typed=() words=()
  current=${line##*[[:space:]]}
  read -ra typed <<<"${line%"$current"}"
  case "${typed[0]##*/}" in
    python*) typed=("${typed[@]:3}") ;;
    *) typed=("${typed[@]:1}") ;;
  esac
  command=${typed[0]:-}
  if [[ $command == data && ${#typed[@]} -gt 1 ]]; then command="data ${typed[1]}"; fi
  mapfile -t words < <(_attention_trainer_words "$command" "$current" |
    _attention_trainer_next "$current")
  # readline completes what stands after an =, where that ends a word
  start=''
  if [[ $COMP_WORDBREAKS == *=* && $current == *=* ]]; then start="${current%"${current##*=}"}"; fi
  COMPREPLY=("${words[@]#"$start"}")
  if [[ "${words[*]}" == *[=.] ]]; then compopt -o nospace 2>/dev/null; fi
}

_attention_trainer_python() {
  if [[ $COMP_CWORD -gt 2 && ${COMP_WORDS[1]} == -m && ${COMP_WORDS[2]} == trainer ]]; then
    _attention_trainer
  elif [[ -n ${_attention_trainer_before:-} ]]; then
    "$_attention_trainer_before" "$@"
  fi
}

# what completes python otherwise, also where bash-completion would load it only when it is needed
_comp_load python &>/dev/null || _completion_loader python &>/dev/null || true
_attention_trainer_found=$(complete -p python 2>/dev/null | sed -n 's/.* -F \([^ ]*\) .*/\1/p')
if [[ $_attention_trainer_found != _attention_trainer* ]]; then
  _attention_trainer_before=$_attention_trainer_found
fi
unset _attention_trainer_found
complete -o bashdefault -o default -F _attention_trainer attention-trainer
complete -o bashdefault -o default -F _attention_trainer_python python python3
